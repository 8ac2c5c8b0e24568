"""The parts of a training step, each as the trainer runs it, without ZeRO: one process, plain PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.modeling import load_causal_lm
from modeseek_ray.objectives.collate import Batch, collate
from modeseek_ray.objectives.logprobs import token_scores
from modeseek_ray.objectives.loss import weighted_loss_sum
from modeseek_ray.objectives.model import ScoringModel
from modeseek_ray.routing.hooks import record_routes, replay_routes
from tests.gpu.measure import take
from tests.gpu.workload import Case

Figures = dict[str, float | None]


def log_prob_kernel(case: Case, rate: float) -> Figures:
    """Token log-probabilities out of hidden states, forward and backward, never holding the logits."""
    d, v = case.shape["hidden_size"], case.shape["vocab_size"]
    hidden_MD = torch.randn(case.num_trained, d, device=case.device, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(v, d, device=case.device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    target_M = torch.randint(0, v, (case.num_trained,), device=case.device)

    def work() -> None:
        token_scores(hidden_MD, weight_VD, target_M, entropy=True).log_prob_M.sum().backward()
        hidden_MD.grad = weight_VD.grad = None

    taken = take(work, case.device, case.repeats)
    flops = 3 * 2.0 * case.num_trained * d * v  # the second product of the head is not counted
    return {
        "tokens_per_s": case.num_trained / taken.seconds,
        "share_of_matmul_rate": flops / taken.seconds / rate,
        "peak_gib": _gib(taken.peak_bytes),
        "inputs_and_gradients_gib": _gib(4 * (hidden_MD.numel() + weight_VD.numel())),
        "logits_would_take_gib": _gib(4 * case.num_trained * v),
        **_errors(hidden_MD[:64], weight_VD, target_M[:64]),
    }


def _errors(hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> Figures:
    """Of a few positions against float64: nats, and the gradients' relative difference.

    Each position's gradient has a size and sign of its own. The parameters are bfloat16 and so are their
    gradients, which alone makes 2e-3.
    """
    upstream_M = torch.linspace(-1, 2, len(target_M), device=hidden_MD.device)
    ours = [t.detach().clone().requires_grad_() for t in (hidden_MD, weight_VD)]
    exact = [t.detach().double().requires_grad_() for t in (hidden_MD, weight_VD)]
    found_M = token_scores(*ours, target_M).log_prob_M
    logits_MV = exact[0] @ exact[1].t()
    expected_M = logits_MV.log_softmax(1).gather(1, target_M[:, None])[:, 0]
    (found_M * upstream_M).sum().backward()
    (expected_M * upstream_M).sum().backward()
    off = [
        float((a.grad.double() - b.grad).norm() / b.grad.norm())  # type: ignore[union-attr, operator]
        for a, b in zip(ours, exact, strict=True)
    ]
    return {
        "max_abs_error_nats": float((found_M.double() - expected_M).abs().max().detach()),
        "hidden_gradient_error": off[0],
        "weight_gradient_error": off[1],
    }


class Step:
    """The model under AdamW: what a rank does of a batch, as one micro-batch."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        self.module = ScoringModel(load_causal_lm(directory, "bfloat16").to(case.device)).train()  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6)
        rows = case.rows()
        self.batch: Batch = collate(rows, range(len(rows)), pad_id=1).to(case.device)
        self.values_B = torch.ones(len(rows), dtype=torch.float64, device=case.device)

    def scores(self) -> Any:
        batch = self.batch
        return self.module(batch.input_ids_BS, batch.attention_mask_BS, batch.positions_M, batch.target_M)

    def forward(self, context: AbstractContextManager[Any]) -> None:
        with torch.no_grad(), context:
            self.scores()

    def step(self, context: AbstractContextManager[Any]) -> None:
        with context:
            scores = self.scores()
        batch = self.batch
        loss = weighted_loss_sum(
            scores.log_prob_M,
            batch.sample_M,
            self.values_B,
            None,
            batch.num_tokens_B,
            "token",
            float(self.case.num_trained),
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def routes(self) -> np.ndarray:
        with record_routes(self.module) as recording, torch.no_grad():
            self.scores()
        return recording.routes

    def figures(self, rate: float) -> dict[str, Figures]:
        """The step with live routes, and what recording and replaying cost beside it."""
        case, found = self.case, self.routes()
        contexts = {
            "live": nullcontext,
            "recorded": lambda: record_routes(self.module),
            "replayed": lambda: replay_routes(self.module, found),
        }
        figures: dict[str, Figures] = {}
        for name, context in contexts.items():
            forward = take(lambda c=context: self.forward(c()), case.device, case.repeats)  # type: ignore[misc]
            step = take(lambda c=context: self.step(c()), case.device, case.repeats)  # type: ignore[misc]
            figures[name] = {
                "forward_s": forward.seconds,
                "step_s": step.seconds,
                "tokens_per_s": case.num_tokens / step.seconds,
                "share_of_matmul_rate": case.step_flops() / step.seconds / rate,
                "peak_gib": _gib(step.peak_bytes),
            }
        for name in ("recorded", "replayed"):
            for part in ("forward_s", "step_s"):
                live, other = figures["live"][part], figures[name][part]
                assert live is not None and other is not None
                figures[name][f"{part.removesuffix('_s')}_over_live"] = other / live
        return figures


def step_figures(
    case: Case, model: Path, rate: float, scratch: Path, *, engine: bool
) -> dict[str, dict[str, Any]]:
    """The step by routes, and with `engine` the trainer against a vLLM engine of the same weights."""
    from tests.gpu import mismatch

    samples = mismatch.sampled(case, model, scratch / "rollout.npz") if engine else []
    step, results = Step(case, model), {}
    if samples:
        figures = mismatch.table(step.module, samples, case.device)
        results = {f"trainer against engine, {name}": row for name, row in figures.items()}
        step.module.train()
    return results | {f"training step, {name}": row for name, row in step.figures(rate).items()}


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 2**30
