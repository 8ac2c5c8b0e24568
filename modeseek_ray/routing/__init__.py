"""MoE routing replay: record which experts were asked, carry that, ask them again, compare.

`wire.py` and `compare.py` are numpy and may be imported anywhere. The other files load torch and are
imported by `actors` alone; `record_routes` and `replay_routes` load it when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeseek_ray.routing.describe import moe_layers
    from modeseek_ray.routing.hooks import record_routes, replay_routes

__all__ = ["moe_layers", "record_routes", "replay_routes"]


def __getattr__(name: str) -> Any:
    if name in ("record_routes", "replay_routes"):
        from modeseek_ray.routing import hooks

        return getattr(hooks, name)
    if name == "moe_layers":
        from modeseek_ray.routing.describe import moe_layers

        return moe_layers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
