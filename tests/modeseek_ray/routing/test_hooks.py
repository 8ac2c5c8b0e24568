"""What recording and replaying promise, on one architecture; `test_families.py` has all of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modeseek_ray.errors import ModelError, RoutingError
from modeseek_ray.routing import record_routes, replay_routes
from modeseek_ray.routing.compare import compare_routes
from modeseek_ray.routing.hooks import Recording
from tests.modeseek_ray.routing.models import build, tokens

QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}


@pytest.fixture
def model() -> Any:
    return build("qwen3_moe", **QWEN)


def routes_of(model: Any, ids: Tensor) -> np.ndarray:
    with torch.no_grad(), record_routes(model) as recording:
        model(ids)
    return recording.routes


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.square().mean()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_recording_says_what_the_routers_output(model: Any) -> None:
    ids = tokens()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, i, output: seen.append(output[2]))

    routes = routes_of(model, ids)

    assert routes.dtype == np.int16
    expected = torch.stack(seen, dim=1).view(2, 5, 2, 2)  # [B, S, L, K]
    assert (routes == expected.numpy()).all()


def test_replayed_experts_are_the_ones_that_compute(model: Any) -> None:
    """Experts that no route names may hold anything: their weights are not in the output."""
    ids = tokens()
    routes = np.where(np.arange(2) == 0, 4, 1) * np.ones((2, 5, 2, 1), dtype=np.int64)
    with replay_routes(model, routes):
        before = model(ids).logits
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[[0, 2, 3, 5]] = torch.nan
    with replay_routes(model, routes):
        after = model(ids).logits

    assert torch.equal(before, after)
    assert model(ids).logits.isnan().any()


def test_rows_of_minus_one_choose_for_themselves(model: Any) -> None:
    ids = tokens()
    own = routes_of(model, ids)
    routes = (own + 1) % 6
    routes[0] = -1
    routes[1, :, 1] = -1

    with replay_routes(model, routes), record_routes(model) as taken:
        mixed = model(ids).logits

    assert (taken.routes[0] == own[0]).all()
    assert (taken.routes[1, :, 0] == routes[1, :, 0]).all()
    # the experts' products run over other sets of rows: equal but for rounding
    assert (mixed[0] - model(ids).logits[0]).abs().max() < 1e-6
    assert (mixed[1] - model(ids).logits[1]).abs().max() > 1e-4


def test_positions_are_not_mixed_up(model: Any) -> None:
    """Under a causal mask a route at position 3 changes what is said from there on and nothing before."""
    ids = tokens(samples=3)
    own = routes_of(model, ids)
    routes = own.copy()
    routes[1, 3, 0] = [e for e in range(6) if e not in own[1, 3, 0]][:2]

    with replay_routes(model, routes):
        changed = model(ids).logits
    differs = ((changed - model(ids).logits).abs() > 1e-6).any(-1)

    assert not differs[0].any() and not differs[2].any()
    assert differs[1].tolist() == [False, False, False, True, True]


def test_a_replay_can_say_what_routers_would_have_done(model: Any) -> None:
    """In the first layer that is the live choice; later layers see what other experts made of the tokens."""
    ids = tokens()
    own = routes_of(model, ids)
    other = (own + 1) % 6

    with replay_routes(model, other, keep_live=True) as replay:
        model(ids)
    with replay_routes(model, other) as forgetful:
        model(ids)

    assert (replay.live_routes[:, :, 0] == own[:, :, 0]).all()
    assert not (replay.live_routes[:, :, 1] == other[:, :, 1]).all()
    assert compare_routes(replay.live_routes, other).share_differing_L[0] > 0
    with pytest.raises(RoutingError, match="no routes were kept"):
        _ = forgetful.live_routes


@pytest.mark.parametrize("inside_out", [False, True])
def test_a_recording_beside_a_replay_has_what_was_replayed(model: Any, inside_out: bool) -> None:
    ids = tokens()
    routes = (routes_of(model, ids) + 1) % 6
    recording, replay = record_routes(model), replay_routes(model, routes)
    outer, inner = (replay, recording) if inside_out else (recording, replay)

    with outer, inner:
        model(ids)

    assert isinstance(recording, Recording)
    assert (recording.routes == routes).all()


def test_nothing_is_left_behind(model: Any) -> None:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})

    def state() -> list[tuple[object, int]]:
        return [
            (vars(m).get("forward"), len(m._forward_pre_hooks), vars(m).get("_gradient_checkpointing_func"))
            for m in model.modules()
        ]

    before = state()
    with replay_routes(model, routes_of(model, tokens())):
        assert state() != before
        loss_of(model, tokens()).backward()
    assert state() == before
    with pytest.raises(ZeroDivisionError), record_routes(model):
        raise ZeroDivisionError
    assert state() == before


def test_a_router_whose_forward_was_replaced_keeps_the_replacement(model: Any) -> None:
    """Accelerate and others hang their own `forward` on an instance."""
    gate = model.model.layers[0].mlp.gate
    calls = []
    own = gate.forward
    gate.forward = lambda *args: (calls.append(1), own(*args))[1]
    replacement = gate.forward

    routes_of(model, tokens())

    assert calls and gate.forward is replacement


def test_gradients_reach_the_router_under_replayed_routes(model: Any) -> None:
    ids = tokens()
    with replay_routes(model, (routes_of(model, ids) + 1) % 6):
        loss_of(model, ids).backward()

    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 0


def steps(model: Any, ids: Tensor, checkpointing: bool, between: Any = None) -> dict[str, Tensor]:
    """Two forward passes with routes of their own, then one backward through both, contexts long left."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    first = routes_of(model, ids)
    with replay_routes(model, (first + 1) % 6):
        one = loss_of(model, ids)
    with replay_routes(model, (first + 2) % 6):
        two = loss_of(model, ids)
    if between is not None:
        between(model)
    (one + 3 * two).backward()
    return gradients(model)


def test_checkpointing_changes_no_gradient_when_passes_overlap(model: Any) -> None:
    plain, recomputed = (steps(model, tokens(), checkpointing) for checkpointing in (False, True))

    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_a_recomputation_inside_another_pass_is_its_own(model: Any) -> None:
    """The backward of a first pass while a second one's context is open: neither notices the other."""
    ids, model = tokens(), model.train()
    own = routes_of(model, ids)
    with replay_routes(model, (own + 1) % 6):
        loss_of(model, ids).backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with replay_routes(model, (own + 1) % 6):
        loss = loss_of(model, ids)

    with replay_routes(model, (own + 2) % 6), record_routes(model) as second:
        loss.backward()
        loss_of(model, ids)

    assert (second.routes == (own + 2) % 6).all()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", ["replayed", "recorded", "live rows"])
def test_router_noise_does_not_reach_the_choice_when_it_is_recomputed(kind: str) -> None:
    """A router whose correction bias moves between forward and backward chooses anew when recomputed
    (its gates do not see the bias); under a recording or a replay the first choice stands."""
    model = build(
        "deepseek_v3",
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ).train()
    ids = tokens()
    routes = (routes_of(model, ids) + 1) % 6
    if kind == "live rows":
        routes[:, ::2] = -1

    def noisy(checkpointing: bool, observe: bool) -> dict[str, Tensor]:
        subject = copy.deepcopy(model)
        if checkpointing:
            subject.gradient_checkpointing_enable({"use_reentrant": False})
        if not observe:
            loss = loss_of(subject, ids)
        elif kind == "recorded":
            with record_routes(subject):
                loss = loss_of(subject, ids)
        else:
            with replay_routes(subject, routes):
                loss = loss_of(subject, ids)
        for layer in subject.model.layers:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 9.0]))
        loss.backward()
        return gradients(subject)

    plain, recomputed = noisy(False, True), noisy(True, True)

    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    try:  # and the noise does matter: unobserved, a recomputation fails or gives another gradient
        unobserved = noisy(True, False)
    except torch.utils.checkpoint.CheckpointError:
        return
    router = "model.layers.1.mlp.gate.weight"
    assert not torch.allclose(unobserved[router], noisy(False, False)[router], rtol=1e-3)


def test_reentrant_checkpointing_is_refused(model: Any) -> None:
    routes = routes_of(model, tokens())
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RoutingError, match="would choose experts anew"), replay_routes(model, routes):
        loss_of(model, tokens())


def test_a_pass_that_is_not_made_whole_is_an_error(model: Any) -> None:
    routes = routes_of(model, tokens())
    with pytest.raises(RoutingError, match=r"2 of 2 routers did not run .*layers.0.mlp.gate \(layer 0\)"):
        run(model, [], routes)
    with pytest.raises(RoutingError, match=r"layers.0.mlp.gate \(layer 0\) chose twice"):
        run(model, [tokens(), tokens()], routes)
    replay = replay_routes(model, routes)
    model.model.layers[1].mlp = nn.Identity()
    with (
        pytest.raises(RoutingError, match=r"1 of 2 routers did not run .*layers.1.mlp.gate \(layer 1\)"),
        replay,
    ):
        model(tokens())


def run(model: Any, passes: list[Tensor], routes: np.ndarray) -> None:
    with replay_routes(model, routes):
        for ids in passes:
            model(ids)


def test_routes_of_other_positions_are_refused(model: Any) -> None:
    routes = routes_of(model, tokens())
    with pytest.raises(
        RoutingError, match=r"for \(2, 5\) samples and positions, the forward pass has \(5, 2\)"
    ):
        run(model, [tokens(5, 2)], routes)
    with pytest.raises(RoutingError, match="name expert 6"):
        replay_routes(model, routes * 0 + [6, 1])
    with pytest.raises(RoutingError, match=r"expected \[batch, positions, routers, experts\]"):
        replay_routes(model, routes[0])


def test_a_dense_model_is_refused() -> None:
    dense = build("qwen3")
    with pytest.raises(ModelError, match="Qwen3ForCausalLM has no experts") as caught:
        record_routes(dense)
    assert caught.value.code == "cannot_replay_routes"


def test_a_model_is_not_copied_while_it_is_observed(model: Any) -> None:
    with pytest.raises(RuntimeError, match="would run the original"), record_routes(model):
        copy.deepcopy(model)
