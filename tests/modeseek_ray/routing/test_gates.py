"""Gate values under replay, by hand: they are what each architecture makes of its live scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeseek_ray.errors import RoutingError
from modeseek_ray.routing import moe_layers, record_routes, replay_routes
from modeseek_ray.routing.describe import find_routers
from modeseek_ray.routing.wire import compact
from tests.modeseek_ray.routing.models import build, other_routes, tokens

THREE = {"num_experts": 3, "num_local_experts": 3, "num_hidden_layers": 1}


def gates(model: Any, routes: np.ndarray, output: int) -> Tensor:
    """What the first router returns at position `output` of its tuple, under replay, for the first token."""
    seen: list[Tensor] = []
    handle = find_routers(model)[0].module.register_forward_hook(
        lambda m, i, out: seen.append(out[output][0])
    )
    try:
        with torch.no_grad(), replay_routes(model, routes):
            model(tokens(1, routes.shape[1]))
    finally:
        handle.remove()
    return seen[0]


def score(model: Any, logits: list[float]) -> None:
    """Let the first router score every token with these logits: the model's norm gives vectors of ones."""
    router = find_routers(model)[0]
    with torch.no_grad():
        router.layer.register_forward_pre_hook(lambda m, args: (torch.ones_like(args[0]), *args[1:]))
        for parameter in (*router.layer.self_attn.o_proj.parameters(), *router.module.parameters()):
            parameter.zero_()
        router.module.weight.copy_(torch.tensor(logits)[:, None] / router.module.weight.shape[1])


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [
        # router scores (2, 1, 0), experts {1, 2}: METHODS.md section 6
        ("gpt_oss", {}, (0.7311, 0.2689)),  # softmax over the chosen
        ("mixtral", {}, (0.7311, 0.2689)),  # softmax first, then normalised over the chosen: the same
        ("qwen2_moe", {"norm_topk_prob": False}, (0.2447, 0.0900)),  # softmax first
    ],
)
def test_the_two_orders_of_softmax_and_choice(
    architecture: str, more: dict[str, Any], expected: tuple[float, float]
) -> None:
    model = build(architecture, **THREE, **more)
    score(model, [2.0, 1.0, 0.0])

    given = gates(model, np.array([1, 2]).reshape(1, 1, 1, 2), output=1)

    assert given.tolist() == pytest.approx(expected, abs=5e-5)


def test_an_expert_outside_the_live_groups_has_its_live_gate() -> None:
    """DeepSeek-V2 sets the scores of groups that are not admitted to zero before it chooses."""
    model = build("deepseek_v2", topk_group=1, routed_scaling_factor=2.0)
    ids = tokens()
    routes = other_routes(record(model, ids), find_routers(model))  # whole groups away from the live choice
    seen: list[tuple[Tensor, ...]] = []
    find_routers(model)[0].module.register_forward_hook(lambda m, i, out: seen.append(out))

    with torch.no_grad(), replay_routes(model, routes):
        model(ids)

    [(logits, given, index)] = seen
    assert (index.view(2, 5, 2).numpy() == routes[:, :, 0]).all()
    torch.testing.assert_close(given, 2.0 * logits.softmax(-1).gather(1, index))


def test_experts_of_more_groups_than_a_router_admits_are_refused() -> None:
    model = build("deepseek_v2", topk_group=1)  # three groups of two experts, one admitted
    routes = record(model, tokens())
    routes[0, 0, 0] = [1, 2]
    with pytest.raises(RoutingError, match="lie in 2 groups of experts; it admits 1"):
        replay_routes(model, routes)


def record(model: Any, ids: Tensor) -> np.ndarray:
    with torch.no_grad(), record_routes(model) as recording:
        model(ids)
    return recording.routes


def test_more_than_256_experts() -> None:
    model = build("qwen3_moe", num_experts=300, num_local_experts=300, num_experts_per_tok=4)
    ids = tokens(4, 8)
    live = model(ids).logits
    routes = record(model, ids)
    carried = compact(routes, moe_layers(model).num_experts)

    with replay_routes(model, carried):
        replayed = model(ids).logits

    assert routes.max() > 255 and carried.dtype == np.int16
    assert torch.equal(replayed, live)


def test_numbers_that_are_no_gates_do_not_matter() -> None:
    """`topk` inside attention (DeepSeek's indexer) is none of ours, though it has as many heads as experts."""
    model = build("deepseek_v32", index_topk=2, index_n_heads=6)
    names = [router.name for router in find_routers(model)]
    assert names == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
