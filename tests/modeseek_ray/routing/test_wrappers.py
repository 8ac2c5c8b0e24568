"""Models inside something else: our own scoring wrapper, PEFT, DeepSpeed's router in place of the model's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from modeseek_ray.objectives.model import ScoringModel
from modeseek_ray.routing import record_routes, replay_routes
from modeseek_ray.routing.describe import find_routers
from tests.modeseek_ray.routing.models import build, other_routes, tokens


def scoring_inputs(ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score every token but the first of each sample."""
    positions = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    return ids, torch.ones_like(ids), positions, ids[:, 1:].flatten()


def adapted(model: Any) -> Any:
    """LoRA on attention and on the experts, not zero, so that it matters."""
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainers_wrappers(lora: bool, checkpointing: bool) -> None:
    model = build("qwen3_moe")
    if lora:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = adapted(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = ScoringModel(model).train()
    inputs = scoring_inputs(tokens())
    live = module(*inputs).log_prob_M
    with record_routes(module) as recording:
        module(*inputs)
    routes = recording.routes
    other = other_routes(routes, find_routers(module))

    with replay_routes(module, routes):
        own = module(*inputs).log_prob_M
    with replay_routes(module, other), record_routes(module) as taken:
        replayed = module(*inputs).log_prob_M
    replayed.sum().backward()

    assert torch.equal(own, live)
    assert not torch.equal(replayed, live)
    assert (taken.routes == other).all()
    assert all(p.grad is not None for name, p in module.named_parameters() if "lora_B" in name)


def test_hooks_of_others_see_what_they_would_have_seen() -> None:
    """DeepSpeed gathers a partitioned weight in hooks around `forward`: they run around ours, too."""
    model = build("qwen3_moe")
    gate = model.model.layers[0].mlp.gate
    weight = gate.weight.detach().clone()

    def gather(module: nn.Module, args: Any) -> None:
        module.weight.data = weight.clone()

    def release(module: nn.Module, args: Any, output: Any) -> None:
        module.weight.data = torch.full_like(weight, torch.nan)

    with torch.no_grad(), record_routes(model) as recording:
        expected = model(tokens()).logits
    gate.register_forward_pre_hook(gather)
    gate.register_forward_hook(release)

    with torch.no_grad(), replay_routes(model, recording.routes):
        assert torch.equal(model(tokens()).logits, expected)


class _Layer(nn.Module):
    """A decoder layer of two experts per token with DeepSpeed's router, as AutoEP builds them."""

    def __init__(self, width: int, **options: Any) -> None:
        from deepspeed.moe.ep_router import TokenChoiceTopKRouter

        super().__init__()
        self.router = TokenChoiceTopKRouter(
            dim=width, num_experts=6, top_k=2, route_norm=True, route_scale=1.0, gate_bias=False, **options
        )
        self.experts = nn.Parameter(torch.randn(6, width, width))

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        flat_ND = hidden_BSD.flatten(0, 1)
        gate_NK, index_NK, count_E = self.router(flat_ND)
        assert count_E.sum() == index_NK.numel()
        output_NKD = torch.einsum("nd,nkde->nke", flat_ND, self.experts[index_NK])
        return hidden_BSD + (gate_NK[..., None] * output_NKD).sum(1).view_as(hidden_BSD)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [None, 3])
def test_deepspeeds_own_router(score_func: str, groups: int | None) -> None:
    options = {
        "score_func": score_func,
        "num_expert_groups": groups,
        "num_limited_groups": None if groups is None else 2,
    }
    model = nn.Module()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.layers = nn.ModuleList([_Layer(8, **options), _Layer(8, **options)])
        hidden = torch.randn(2, 5, 8)
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    live = model.forward(hidden)

    with record_routes(model) as recording:
        recorded = model.forward(hidden)
    with replay_routes(model, recording.routes):
        own = model.forward(hidden)
    other = other_routes(recording.routes, find_routers(model))
    with replay_routes(model, other), record_routes(model) as taken:
        replayed = model.forward(hidden)
    replayed.square().mean().backward()

    assert torch.equal(recorded, live) and torch.equal(own, live)
    assert (taken.routes == other).all() and not torch.equal(replayed, live)
    assert [(r.num_experts, r.top_k, r.num_groups) for r in find_routers(model)] == [(6, 2, groups or 0)] * 2
    assert all(layer.router.gate.weight.grad.abs().max() > 0 for layer in model.layers)
    # gates by hand: live scores of the given experts, normalised over them
    router = model.layers[0].router
    scores = router.gate(hidden.flatten(0, 1))
    scores = scores.softmax(-1) if score_func == "softmax" else scores.sigmoid()
    index = torch.from_numpy(other[:, :, 0].reshape(-1, 2).astype(np.int64))
    expected = scores.gather(1, index) / scores.gather(1, index).sum(-1, keepdim=True)
    seen: list[Tensor] = []
    router.register_forward_hook(lambda m, i, output: seen.append(output[0]))
    with replay_routes(model, other):
        model.forward(hidden)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_routes_of_a_stock_model_replay_in_its_autoep_conversion(architecture: str) -> None:
    """DeepSpeed replaces whole MoE blocks (here on one rank); routers stay in their layers, in their order."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    model, ids = build(architecture), tokens()
    with torch.no_grad(), record_routes(model) as recording:
        stock = model(ids).logits
    other = other_routes(recording.routes, find_routers(model))
    with torch.no_grad(), replay_routes(model, other):
        stock_other = model(ids).logits
    conversion = AutoEP(
        model,
        AutoEPConfig(
            enabled=True,
            autoep_size=1,
            preset_model=architecture,
            load_balance_coeff=None,
            use_grouped_mm=False,
        ),
    )
    for spec in conversion.ep_parser():
        conversion.replace_moe_layer(spec, ep_size=1, ep_rank=0)

    assert {type(r.module).__name__ for r in find_routers(model)} == {"TokenChoiceTopKRouter"}
    with replay_routes(model, recording.routes):
        torch.testing.assert_close(model(ids).logits, stock, rtol=1e-5, atol=1e-6)
    with replay_routes(model, other):
        torch.testing.assert_close(model(ids).logits, stock_other, rtol=1e-5, atol=1e-6)
    assert (stock_other - stock).abs().max() > 1e-4
