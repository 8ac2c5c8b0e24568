"""Expert routes as they travel between processes: numpy, compact, checked. No torch.

    T  tokens of one sample     B  samples of a micro-batch     S  positions of a micro-batch
    L  routers of a model, in the order the model holds them                K  experts per token

A sample's routes are `[T - 1, L, K]`: position t holds the experts that were asked while token t was
read and token t + 1 predicted; the last token predicts nothing and has no row. All K entries of a row
are -1 where the router shall choose by itself ("live"); 0 is an expert and never means "unknown".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.errors import RoutingError

Routes = NDArray[Any]  # of integers; signed where it holds LIVE

LIVE = -1
_MAX_EXPERTS = np.iinfo(np.int16).max + 1


@dataclass(frozen=True)
class MoeLayers:
    """The routers of a model, one entry each, in the order the model holds them.

    `hidden_L` counts decoder layers from 0 and leaves dense ones out. A layer with two routers (JetMoe
    routes attention heads as well) has two entries.

    >>> layers = MoeLayers(names_L=("layers.1.mlp.gate",), hidden_L=(1,), num_experts_L=(8,), top_k_L=(2,))
    >>> len(layers), layers.width
    (1, 2)
    """

    names_L: tuple[str, ...]
    hidden_L: tuple[int, ...]
    num_experts_L: tuple[int, ...]
    top_k_L: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names_L)

    @property
    def width(self) -> int:
        """K: the most experts any router asks for a token. Others fill their rows up with -1."""
        return max(self.top_k_L, default=0)

    @property
    def num_experts(self) -> int:
        """The largest number of experts of any router."""
        return max(self.num_experts_L, default=0)


def compact(routes: Routes, num_experts: int) -> Routes:
    """The same routes in the smallest integers that hold `num_experts` and, where it occurs, -1.

    >>> compact(np.array([[[3, 1]]]), num_experts=256).dtype, compact(np.array([[[3, 1]]]), 257).dtype
    (dtype('uint8'), dtype('int16'))
    """
    _refuse(num_experts > _MAX_EXPERTS, f"{num_experts} experts do not fit 16 bits.")
    _whole_numbers(routes)
    low, high = (int(routes.min()), int(routes.max())) if routes.size else (0, 0)
    _refuse(low < LIVE or high >= num_experts, f"expert {high if low >= LIVE else low} of {num_experts}.")
    for dtype in (np.int8, np.int16) if low < 0 else (np.uint8, np.int16):
        if num_experts - 1 <= np.iinfo(dtype).max:
            return np.ascontiguousarray(routes, dtype=dtype)
    raise AssertionError("16 bits hold every number of experts that gets here")


def check_routes(routes: Routes, layers: MoeLayers, *, what: str = "routes") -> None:
    """Refuse routes `[..., L, K]` that the model cannot take; `what` begins the message.

    Each row is K different experts of its router, or -1 throughout. Where a router asks fewer than
    K, the rest of its row is -1. Raises `RoutingError` naming the first router that does not fit.
    """
    _whole_numbers(routes)
    expected = (len(layers), layers.width)
    _refuse(
        routes.ndim < 2 or routes.shape[-2:] != expected,
        f"{what} have shape {routes.shape}; the model has {expected[0]} routers of {expected[1]} experts a token: "
        f"expected [..., {expected[0]}, {expected[1]}].",
    )
    for router, (name, num_experts, top_k) in enumerate(
        zip(layers.names_L, layers.num_experts_L, layers.top_k_L, strict=True)
    ):
        row_NK = routes[..., router, :].reshape(-1, expected[1]).astype(np.int32, copy=False)
        place = f"{what} of {name}"
        low, high = (int(row_NK.min()), int(row_NK.max())) if row_NK.size else (LIVE, LIVE)
        _refuse(
            low < LIVE or high >= num_experts,
            f"{place} name expert {high if high >= num_experts else low}; it has experts 0 to {num_experts - 1}.",
        )
        _refuse(
            bool((row_NK[:, top_k:] != LIVE).any()), f"{place} name more than its {top_k} experts a token."
        )
        used_NK = row_NK[:, :top_k]
        live_N = used_NK[:, 0] == LIVE
        _refuse(
            bool(((used_NK == LIVE) != live_N[:, None]).any()),
            f"{place} are given for some of a token's {top_k} experts and left open (-1) for others.",
        )
        sorted_NK = np.sort(used_NK[~live_N], axis=1)
        _refuse(
            bool((sorted_NK[:, 1:] == sorted_NK[:, :-1]).any()),
            f"{place} name one expert twice for a token (a dense layer taken for an MoE layer looks like that).",
        )


def from_vllm(routed_experts: Routes, layers: MoeLayers) -> Routes:
    """`CompletionOutput.routed_experts` `[T - 1, hidden layers, K]` to wire form `[T - 1, L, K]`.

    vLLM gives one entry per decoder layer and leaves dense ones zero; only those in `layers` are kept.
    Raises `RoutingError` where layers or experts do not match the trainer's model.
    """
    twice = len(set(layers.hidden_L)) != len(layers)
    _refuse(twice, "the model has several routers in one layer; vLLM reports one choice per layer.")
    last = max(layers.hidden_L, default=-1)
    _refuse(
        routed_experts.ndim != 3 or routed_experts.shape[1] <= last,
        f"the engine's routes have shape {routed_experts.shape}; expected [tokens, more than {last} layers, experts].",
    )
    dense = sorted(set(range(routed_experts.shape[1])) - set(layers.hidden_L))
    used = [layer for layer in dense if routed_experts[:, layer].any()]
    _refuse(bool(used), f"the engine routes in layers {used}, which are dense in the trainer's model.")
    picked_TLK = routed_experts[:, list(layers.hidden_L)]
    check_routes(picked_TLK, layers, what="the engine's routes")
    return compact(picked_TLK, layers.num_experts)


def batch_routes(
    routes_B: Sequence[Routes | None], length: int, *, layers: MoeLayers | None = None
) -> NDArray[np.int16]:
    """Samples' routes as one `[B, S, L, K]` array, S = `length`; positions without a route are -1.

    None is a sample without routes. `layers` gives L and K where no sample has any.

    >>> batch_routes([np.array([[[3, 1]]]), None], length=2)[:, :, 0].tolist()
    [[[3, 1], [-1, -1]], [[-1, -1], [-1, -1]]]
    """
    shapes = {routes.shape[1:] for routes in routes_B if routes is not None}
    if layers is not None:
        shapes.add((len(layers), layers.width))
    _refuse(not shapes, "no sample of the batch has routes, and the model was not named.")
    _refuse(len(shapes) > 1, f"samples come with different routers and experts per token: {sorted(shapes)}.")
    batch_BSLK = np.full((len(routes_B), length, *shapes.pop()), LIVE, dtype=np.int16)
    for b, routes_TLK in enumerate(routes_B):
        if routes_TLK is None:
            continue
        _whole_numbers(routes_TLK)
        _refuse(
            len(routes_TLK) > length, f"sample {b} has routes for {len(routes_TLK)} of {length} positions."
        )
        _refuse(
            bool(routes_TLK.size) and int(routes_TLK.max()) >= _MAX_EXPERTS,
            f"sample {b} names an expert beyond {_MAX_EXPERTS - 1}.",
        )
        batch_BSLK[b, : len(routes_TLK)] = routes_TLK
    return batch_BSLK


def split_batch(batch_BSLK: Routes, length_B: Sequence[int], num_experts: int) -> list[Routes]:
    """Recorded routes of a right-padded batch back to one compact `[T - 1, L, K]` per sample; T = its length."""
    return [compact(batch_BSLK[b, : max(0, length - 1)], num_experts) for b, length in enumerate(length_B)]


def _whole_numbers(routes: Routes) -> None:
    _refuse(
        not np.issubdtype(routes.dtype, np.integer), f"routes are {routes.dtype}; expected whole numbers."
    )


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise RoutingError(message, mend="Replay routes of this very model, as they were recorded.")
