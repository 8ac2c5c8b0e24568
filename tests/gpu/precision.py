"""Log-probabilities of the wide model in bfloat16 against float64 arithmetic on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.modeling import load_causal_lm
from modeseek_ray.objectives.collate import collate
from modeseek_ray.objectives.model import ScoringModel
from modeseek_ray.routing.hooks import record_routes, replay_routes
from tests.gpu.workload import Case

POSITIONS = 512


@torch.no_grad()
def figures(case: Case, model: Path) -> dict[str, Any]:
    """Nats per token. `head`: from the same hidden states. `same_routes`: the whole model, asking the same
    experts; without it a rounded router may ask others, which is another function of the input."""
    short = replace(
        case, samples=1, length=min(case.length, POSITIONS), trained=min(case.trained, POSITIONS // 2)
    )
    batch = collate(short.rows(), [0], pad_id=1).to(case.device)
    inputs = (batch.input_ids_BS, batch.attention_mask_BS, batch.positions_M, batch.target_M)
    module = ScoringModel(load_causal_lm(model, "bfloat16").to(case.device)).eval()  # type: ignore[arg-type]
    with record_routes(module) as recording:
        found = module(*inputs, keep_hidden=True)
    weight_VD = module.head.weight.double()
    assert found.hidden_M is not None
    head_M = _log_probs(found.hidden_M.double(), weight_VD, batch.target_M)

    exact: Any = module.model.double()  # the same values: bfloat16 is exact in float64
    exact.set_experts_implementation("eager")
    whole_M = []
    for replayed in (True, False):
        with replay_routes(module, recording.routes) if replayed else record_routes(module):
            hidden_BSD = exact.base_model(
                input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
            ).last_hidden_state
        hidden_MD = hidden_BSD.flatten(0, 1).index_select(0, batch.positions_M)
        whole_M.append(_log_probs(hidden_MD, weight_VD, batch.target_M))
    off = {"head": head_M, "same_routes": whole_M[0], "live_routes": whole_M[1]}
    answer: dict[str, Any] = {"log_prob_mean_nats": float(found.log_prob_M.mean())}
    for name, exact_M in off.items():
        off_M = (found.log_prob_M.double() - exact_M).abs()
        answer |= {f"{name}_mean_nats": float(off_M.mean()), f"{name}_max_nats": float(off_M.max())}
    return answer


def _log_probs(hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> Tensor:
    logits_MV = hidden_MD @ weight_VD.t()
    return logits_MV.log_softmax(1).gather(1, target_M[:, None])[:, 0]
