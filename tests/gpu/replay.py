"""Routing replay on the device, family by family of transformers' MoE models, each tiny and random, float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeseek_ray.routing.describe import find_routers
from modeseek_ray.routing.hooks import record_routes, replay_routes
from tests.gpu.measure import finish

# Every family takes part on a card; at toy size these show that the code runs.
AT_TOY_SIZE = ("qwen3_moe", "deepseek_v3")


def figures(device: str, *, tiny: bool) -> dict[str, Any]:
    """How many families hold, and what went wrong with the others."""
    from tests.modeseek_ray.routing.models import FAMILIES

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    checks: dict[str, Callable[[Any, Tensor], bool | None]] = {
        "own_routes_change_no_bit": own_routes,
        "other_routes_teach_routers": other_routes_teach,
        "recomputed_alike": recomputed,
    }
    found: dict[str, Any] = {name: 0 for name in checks}
    families = [f for f in FAMILIES if not tiny or f in AT_TOY_SIZE]
    not_supported: list[str] = []
    for family in families:
        for name, check in checks.items():
            try:
                held = _on_device(family, device, check)
            except Exception as error:
                found[f"{name}: {family}"] = f"{type(error).__name__}: {error}"[:200]
                continue
            if held is None:
                not_supported.append(family)
            elif held:
                found[name] += 1
            else:
                found[f"{name}: {family}"] = "no"
    torch.use_deterministic_algorithms(False)
    return {"families": len(families), "no_checkpointing_in_transformers": len(not_supported), **found}


def _on_device(family: str, device: str, check: Callable[[Any, Tensor], bool | None]) -> bool | None:
    from tests.modeseek_ray.routing.models import build, tokens

    held = check(build(family).to(device), tokens().to(device))
    finish(device)
    return held


def own_routes(model: Any, ids: Tensor) -> bool:
    """Logits and gradients of replayed own routes are those of live ones, bit for bit."""
    live, live_gradients = passed(model, ids)
    with record_routes(model) as recording:
        model(ids)
    with replay_routes(model, recording.routes):
        logits, found = passed(model, ids)
    return torch.equal(live, logits) and all(torch.equal(found[n], g) for n, g in live_gradients.items())


def other_routes_teach(model: Any, ids: Tensor) -> bool:
    """Routes the model would not have taken change its answer, and each router gets a gradient."""
    other = _other(model, ids)
    live, _ = passed(model, ids)
    with replay_routes(model, other):
        logits, _ = passed(model, ids, clear=False)
    slopes = [
        max(float(p.grad.abs().max()) for p in router.module.parameters() if p.grad is not None)
        for router in find_routers(model)
    ]
    return bool(logits.isfinite().all()) and not torch.equal(live, logits) and min(slopes) > 0


def recomputed(model: Any, ids: Tensor) -> bool | None:
    """Gradient checkpointing asks the replayed experts again. None where transformers has none."""
    if not model.supports_gradient_checkpointing:
        return None
    other = _other(model, ids)
    other[:, ::2] = -1
    gradients = []
    for checkpointing in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        with replay_routes(own, other):
            loss = own(ids).logits.square().mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in own.named_parameters() if p.grad is not None})
    plain, again = gradients
    return plain.keys() == again.keys() and all(
        torch.allclose(again[n], g, rtol=1e-5, atol=1e-7) for n, g in plain.items()
    )


def passed(model: Any, ids: Tensor, *, clear: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one pass forward and backward."""
    model.zero_grad(set_to_none=True)
    logits = model(ids).logits
    logits.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if clear:
        model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def _other(model: Any, ids: Tensor) -> Any:
    from tests.modeseek_ray.routing.models import other_routes

    with torch.no_grad(), record_routes(model) as recording:
        model(ids)
    return other_routes(recording.routes, find_routers(model))
