"""The load-balancing loss: against its formula in float64, transformers' own, and under replay and recomputation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeseek_ray.errors import ModelError
from modeseek_ray.objectives.model import unwrap
from modeseek_ray.routing.balance import LoadBalancing
from modeseek_ray.routing.describe import find_routers
from modeseek_ray.routing.hooks import record_routes, replay_routes
from tests.modeseek_ray.routing.models import FAMILIES, build, other_routes, tokens

# Families for which transformers has the loss and gives every router's logits; the others are refused.
BALANCED = [
    "dbrx",
    "deepseek_v4",
    "minimax_m3_vl_text",
    "ernie4_5_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jamba",
    "laguna",
    "mellum",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
]


def switch_loss(logits: list[Tensor], top_k: int, mask: Tensor) -> float:
    """Equations 4 to 6 of 2101.03961 in float64 numpy, layers pooled, padding left out."""
    real = mask.reshape(-1).numpy().astype(bool)
    rows = np.concatenate([gate.detach().double().numpy().reshape(len(real), -1)[real] for gate in logits])
    chance = np.exp(rows - rows.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    asked = np.zeros_like(chance)
    np.put_along_axis(asked, np.argsort(-chance, axis=1)[:, :top_k], 1.0, axis=1)
    return float(rows.shape[1] * (asked.mean(0) * chance.mean(0)).sum())


def balance(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor], LoadBalancing]:
    balancing = LoadBalancing.of(model, unwrap(model))
    with balancing.watching() as logits:
        model(input_ids=ids, attention_mask=mask)
    return balancing.loss(logits, mask), logits, balancing


def padded() -> tuple[Tensor, Tensor]:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    return ids, mask


@pytest.mark.parametrize("name", BALANCED)
def test_it_is_the_formula_s_and_transformers_own(name: str) -> None:
    model = build(name)
    ids, mask = padded()
    found, logits, balancing = balance(model, ids, mask)
    assert found.item() == pytest.approx(switch_loss(logits, balancing.top_k, mask), rel=1e-5)
    own = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert found.item() == pytest.approx(own.item(), rel=1e-5)
    found.backward()
    moved = [r for r in find_routers(model) if any(p.grad is not None for p in r.module.parameters())]
    assert len(moved) == len(find_routers(model)), "every router learns to balance"


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(BALANCED)))
def test_families_without_one_are_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(ModelError) as refused:
        LoadBalancing.of(model, unwrap(model))
    assert refused.value.code == "no_load_balancing"


def test_even_routing_gives_the_least_and_one_expert_for_all_the_most() -> None:
    model = build("mixtral")
    balancing = LoadBalancing.of(model, model)
    mask = torch.ones(1, 6, dtype=torch.int64)
    even = torch.full((6, 6), -9.0)
    for t in range(6):  # each of six experts twice among six tokens' pairs
        even[t, [t, (t + 1) % 6]] = 9.0
    assert float(balancing.loss([even, even], mask)) == pytest.approx(2.0, rel=1e-6)
    alike = torch.full((6, 6), -9.0)
    alike[:, 0], alike[:, 1] = 9.0, -8.0
    # f = (1, 1, 0, …), P = (1, 0, …): 6 * (1 * 1 + 1 * 0)
    assert float(balancing.loss([alike, alike], mask)) == pytest.approx(6.0, rel=1e-6)


def test_counts_are_of_the_live_choice_whatever_is_replayed() -> None:
    """The first router sees the same under any replay: its logits, and what it counts, stay as they are."""
    model = build("qwen3_moe")
    ids, mask = padded()
    balancing = LoadBalancing.of(model, model)
    with torch.no_grad(), record_routes(model) as recording, balancing.watching() as live:
        model(input_ids=ids, attention_mask=mask)
    expected = recording.load(mask)
    forced = other_routes(recording.routes, find_routers(model))
    with (
        torch.no_grad(),
        replay_routes(model, forced, keep_live=True) as replay,
        balancing.watching() as kept,
    ):
        model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(kept[0], live[0], rtol=0, atol=0)
    np.testing.assert_array_equal(replay.load(mask)[0], expected[0])
    assert all(counts.sum() == mask.sum() * balancing.top_k for counts in expected), "padding asks nobody"
    with torch.no_grad(), replay_routes(model, forced) as blind:
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(RuntimeError, match="keep_live"):
        blind.load(mask)


def test_recomputation_gives_the_same_gradients() -> None:
    model = build("qwen3_moe").train()
    ids, mask = padded()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        balancing = LoadBalancing.of(model, model)
        with record_routes(model), balancing.watching() as logits:
            output = model(input_ids=ids, attention_mask=mask).logits.square().mean()
        (output + balancing.loss(logits, mask)).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)
