"""What is measured along a run's path: old tasks, text, the new task, and KL to the start on new prompts.

P  problems of the new task      M  predicted tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modeseek_ray.objectives.collate import Batch, collate
from modeseek_ray.objectives.loss import sum_by_sample
from modeseek_ray.objectives.model import Reference, ScoringModel
from modeseek_ray.types import Sample
from tests.bench.forgetting import world
from tests.bench.forgetting.sampling import sample_answers
from tests.bench.forgetting.train import inputs

ROWS_AT_ONCE = 128


class Probes:
    """Everything measured is collated once; the start's hidden states on its own answers are kept."""

    def __init__(self, base: world.Base, frozen: ScoringModel, variant: str) -> None:
        device = frozen.model.device
        self._old = _Collated(world.old_tasks(base), device)
        self._new = _Collated(world.new_problems(base, variant), device)
        own = _own_answers(base, variant)
        self._own = collate(own, range(len(own)), pad_id=0).to(device)
        with torch.no_grad():
            hidden = frozen(*inputs(self._own), keep_hidden=True).hidden_M
        self._start = Reference(hidden, "forward", frozen.frozen_head())

    @torch.no_grad()
    def measure(self, module: ScoringModel) -> dict[str, float]:
        """success, old_accuracy, each task's accuracy, text_nll, new_kl_nats; shares and nats per token."""
        was_training = module.training
        module.eval()
        right, nll = self._old.score(module)
        tasks = [s.task for s in self._old.samples]
        accuracy = {
            task: float(np.mean([r for r, t in zip(right, tasks, strict=True) if t == task]))
            for task in dict.fromkeys(tasks)
            if task != "text"
        }
        text = [i for i, t in enumerate(tasks) if t == "text"]
        text_tokens = sum(self._old.samples[i].num_tokens for i in text)
        kl_M = module(*inputs(self._own), reference=self._start).kl_M
        figures = {
            "success": self._success(module),
            "old_accuracy": float(np.mean(list(accuracy.values()))),
            "text_nll": float(sum(nll[i] for i in text) / text_tokens),
            "new_kl_nats": float(kl_M.double().mean()),
            **{f"old_{task}": value for task, value in accuracy.items()},
        }
        module.train(was_training)
        return figures

    def _success(self, module: ScoringModel) -> float:
        """Share of problems of which some answer is what greedy decoding writes."""
        right, _ = self._new.score(module)
        solved: dict[int, bool] = {}
        for sample, is_right in zip(self._new.samples, right, strict=True):
            solved[sample.problem] = solved.get(sample.problem, False) or bool(is_right)
        return float(np.mean(list(solved.values())))


class _Collated:
    """Rows in batches of similar length."""

    def __init__(self, samples: Sequence[Sample], device: torch.device) -> None:
        self.samples = samples
        order = sorted(range(len(samples)), key=lambda i: samples[i].length)
        self._cuts = [order[i : i + ROWS_AT_ONCE] for i in range(0, len(order), ROWS_AT_ONCE)]
        self._batches: list[Batch] = [collate(samples, cut, pad_id=0).to(device) for cut in self._cuts]

    def score(self, module: ScoringModel) -> tuple[np.ndarray, np.ndarray]:
        """Of each row: whether every trained token is the argmax, and its summed NLL."""
        right, nll = np.zeros(len(self.samples), dtype=bool), np.zeros(len(self.samples))
        for cut, batch in zip(self._cuts, self._batches, strict=True):
            scores: Any = module(*inputs(batch))
            correct_B = sum_by_sample(scores.correct_M, batch.sample_M, len(cut))
            right[cut] = (correct_B == batch.num_tokens_B).cpu().numpy()
            nll[cut] = -sum_by_sample(scores.log_prob_M, batch.sample_M, len(cut)).cpu().numpy()
        return right, nll


def _own_answers(base: world.Base, variant: str) -> list[Sample]:
    """One answer of the start's own to each held-out question, drawn at temperature one."""
    prompts = world.probed_prompts(base, variant)
    generator = torch.Generator().manual_seed(base.seed)
    answers, _ = sample_answers(base.model, prompts, int(base.tokenizer.eos_token_id), generator=generator)
    return [world.sample_of(i, p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
