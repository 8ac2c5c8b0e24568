"""Where a model chooses its experts: found by what modules do and hold, not by what they are called.

A router is a module whose own code calls `topk` and which knows its number of experts and how many a
token is given. That holds for transformers' routers, for the blocks that choose without a router of
their own (Jamba, DBRX), and for DeepSpeed's `TokenChoiceTopKRouter`. Attention that selects keys by
`topk` (DeepSeek's indexer) knows no experts and is not taken for one. Models whose experts are chosen
in any other way are refused by name: replay that silently did nothing would be worse than none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import nn

from modeseek_ray.errors import ModelError
from modeseek_ray.routing.wire import MoeLayers

# Names under which modules and configurations keep these numbers; the first that is there counts.
# Classes a router chooses among may exceed the experts that compute: some have experts that do nothing.
_NUM_EXPERTS = (
    "num_router_classes",
    "n_routed_experts",
    "num_experts",
    "moe_num_experts",
    "num_local_experts",
)
_TOP_K = ("top_k", "top_k_experts", "num_experts_per_tok", "moe_top_k", "moe_topk")
_GROUPS = ("num_group", "n_group", "num_expert_groups")
_TOP_GROUPS = ("topk_group", "num_limited_groups")

# Experts chosen otherwise than by `topk` over all of them, and why that cannot be replayed.
_REFUSED = {
    "PhimoeTopKRouter": "draws its experts at random in training, and gives none but the likeliest a gate",
    "DogeCDMoE": "combines two halves of a key, so that `topk` gives no expert's number",
    "SwitchTransformersTop1Router": "drops tokens over an expert's capacity",
    "NllbMoeTop2Router": "drops tokens over an expert's capacity",
}
# Chosen from the token alone, by a fixed table: the same in every engine, nothing to replay.
FIXED = {"DeepseekV4HashRouter"}

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?=\.)")


@dataclass(frozen=True)
class Router:
    """One place where experts are chosen. `index` is its position among the model's L routers."""

    index: int
    name: str  # as in `named_modules`, wrappers included
    module: nn.Module
    layer: nn.Module  # the decoder layer it is in
    hidden: int  # that layer's number, counted from 0 with dense layers
    num_experts: int
    top_k: int
    num_groups: int = 0  # groups of experts of which `top_groups` are admitted first; 0 = no groups
    top_groups: int = 0

    def __str__(self) -> str:
        return f"{self.name} (layer {self.hidden})"


def find_routers(model: nn.Module) -> list[Router]:
    """The model's routers in the order the model holds them; [] for a dense model.

    Looks inside wrappers (PEFT, DeepSpeed engines, `ScoringModel`) and at weights that ZeRO-3 has
    taken apart. Raises `ModelError` for experts whose choice cannot be replayed.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        reason = _REFUSED.get(type(module).__name__)
        if reason is not None:
            raise _not_replayable(model, f"{type(module).__name__} {reason}")
    routers: list[Router] = []
    for name, module in modules.items():
        layer = _LAYER.search(name)
        sizes = None if layer is None else _sizes(module)
        if layer is None or sizes is None:
            continue
        routers.append(
            Router(len(routers), name, module, modules[name[: layer.end()]], int(layer[1]), *sizes)
        )
    _refuse_unrouted_experts(model, modules, routers)
    return routers


def moe_layers(model_or_config: Any) -> MoeLayers:
    """The layer map of a model, or of a transformers configuration (built without memory for weights)."""
    if not isinstance(model_or_config, nn.Module):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model_or_config = AutoModelForCausalLM.from_config(model_or_config)
    return layer_map(find_routers(model_or_config))


def layer_map(routers: list[Router]) -> MoeLayers:
    """What `wire.check_routes` compares routes with."""
    return MoeLayers(
        names_L=tuple(r.name for r in routers),
        hidden_L=tuple(r.hidden for r in routers),
        num_experts_L=tuple(r.num_experts for r in routers),
        top_k_L=tuple(r.top_k for r in routers),
    )


def _sizes(module: nn.Module) -> tuple[int, int, int, int] | None:
    """Experts, experts per token, groups, admitted groups; None where the module is no router."""
    if not any(_calls_topk(owner) for owner in type(module).__mro__):
        return None
    num_experts, top_k = _number(module, _NUM_EXPERTS), _number(module, _TOP_K)
    if num_experts is None and top_k is not None:  # a block that chooses for itself: its experts know
        found = [_number(child, _NUM_EXPERTS) for child in module.children()]
        num_experts = next((n for n in found if n is not None), None)
    if "Router" in type(module).__name__ and (config := getattr(module, "config", None)) is not None:
        num_experts = num_experts or _number(config, _NUM_EXPERTS)
        top_k = top_k or _number(config, _TOP_K)
    if num_experts is None or top_k is None:
        return None
    num_groups, top_groups = _number(module, _GROUPS) or 0, _number(module, _TOP_GROUPS) or 0
    return num_experts, top_k, *((num_groups, top_groups) if num_groups > 1 and top_groups else (0, 0))


def _number(holder: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


@lru_cache(maxsize=4096)
def _calls_topk(owner: type) -> bool:
    """Whether a method that this very class defines names `topk`; torch's own classes never do."""
    if owner.__module__.split(".")[0] == "torch":
        return False
    for member in vars(owner).values():
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        if code is not None and any("topk" in c.co_names for c in _codes(code)):
            return True
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _refuse_unrouted_experts(model: nn.Module, modules: dict[str, nn.Module], routers: list[Router]) -> None:
    """Every set of experts must have its router in the same decoder layer; one without would run live, unseen."""
    routed = {id(router.layer) for router in routers}
    fixed = [name for name, module in modules.items() if type(module).__name__ in FIXED]
    for name in modules:
        layer = _LAYER.search(name)
        if layer is None or not name.endswith(".experts"):
            continue
        inside = name[: layer.end()]
        if id(modules[inside]) not in routed and not any(f.startswith(f"{inside}.") for f in fixed):
            raise _not_replayable(model, f"no module that chooses {name} by `topk` was found")


def _not_replayable(model: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"routes of {type(model).__name__} cannot be recorded or replayed: {reason}.",
        mend="Drop `routing_replay`, or choose an architecture from the table in modeseek_ray/routing/README.md.",
        code="cannot_replay_routes",
    )
