"""Record which experts a forward pass asked, and make another pass ask the same ones.

    B, S  samples and positions of a micro-batch     N  B * S     L  routers     K  experts per token

Recomputation under gradient checkpointing belongs to the forward pass it recomputes: it asks that pass's
experts again, also when the context was left and other passes came in between. The indices travel with
the checkpoint's own `context_fn`; there is no global state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from modeseek_ray.errors import ModelError, RoutingError
from modeseek_ray.routing.choice import Observer, observed
from modeseek_ray.routing.describe import Router, find_routers, layer_map
from modeseek_ray.routing.wire import LIVE, Routes, check_routes
from modeseek_ray.types import IntArray

_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps the function that recomputes a layer


def record_routes(model: nn.Module) -> Recording:
    """Record the experts of the one forward pass made inside `with record_routes(model) as recording:`.

    Afterwards `recording.routes` is int16 `[B, S, L, K]`, padding included. The pass itself is unchanged,
    bit for bit. Raises `ModelError` for a dense model, or one whose routes cannot be had, `RoutingError`
    if the context is left without a whole pass.
    """
    return Recording(model)


def replay_routes(model: nn.Module, routes: Routes | Tensor, *, keep_live: bool = False) -> Replay:
    """Make the one forward pass inside `with replay_routes(model, routes):` ask these experts.

    `routes` is `[B, S, L, K]` over the positions of the pass; a row of -1 leaves the choice to the
    router. The context may be left before the backward pass. Raises `RoutingError` for routes that do
    not fit, and on leaving it if a router did not take its routes; `ModelError` as `record_routes`.

    `keep_live` keeps what each router would have chosen by itself, as `live_routes` of what is returned:
    how far both are apart (`compare.compare_routes`) and how evenly routers load their experts
    (`compare.router_load`) are questions about the live choice.
    """
    return Replay(model, routes, keep_live=keep_live)


class _Pass(Observer):
    """One forward pass, observed from its first layer to its last; every router chooses exactly once."""

    _verb: str

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.routers = find_routers(model)
        if not self.routers:
            raise ModelError(
                f"{type(model).__name__} has no experts to choose from.",
                mend="Routing replay needs an MoE model; drop it or choose one.",
                code="cannot_replay_routes",
            )
        self.layers = layer_map(self.routers)
        self._shape: tuple[int, int] | None = None  # B, S
        self._chosen: dict[nn.Module, Tensor] = {}  # int16 [N, K]; also what a recomputation asks again
        self._contexts = ExitStack()

    def took(self, router: Router, index_NK: Tensor, live_NK: Tensor) -> None:
        if router.module in self._chosen:
            raise RoutingError(
                f"{router} chose twice while routes were {self._verb}.",
                mend="Open one context per forward pass, and recompute with use_reentrant=False only.",
            )
        self._chosen[router.module] = index_NK.to(torch.int16)

    def chosen(self, router: Router) -> Tensor:
        """What the router asked in this pass, int16 [N, K]."""
        return self._chosen[router.module]

    def _gather(self, index: dict[nn.Module, Tensor]) -> NDArray[np.int16]:
        """What routers kept, `[B, S, L, K]`."""
        if self._shape is None or len(index) < len(self.routers):
            raise RoutingError("no routes were kept.", mend="Make a forward pass inside the context first.")
        samples, positions = self._shape
        routes_NLK = np.full((samples * positions, len(self.layers), self.layers.width), LIVE, dtype=np.int16)
        for router in self.routers:
            routes_NLK[:, router.index, : router.top_k] = index[router.module].cpu().numpy()
        return routes_NLK.reshape(samples, positions, *routes_NLK.shape[1:])

    def load(self, attention_mask_BS: Tensor) -> tuple[IntArray, ...]:
        """How many tokens each expert would have got by the routers' own choice, router by router; no padding."""
        real_N = attention_mask_BS.reshape(-1).bool()
        counts = [
            torch.bincount(self.live(router)[real_N].reshape(-1).long(), minlength=router.num_experts)
            for router in self.routers
        ]
        sizes = [len(c) for c in counts]
        return tuple(np.split(torch.cat(counts).cpu().numpy(), np.cumsum(sizes)[:-1]))

    def live(self, router: Router) -> Tensor:
        """What the router would have asked by itself, int16 [N, K]."""
        return self._chosen[router.module]

    def over(self, shape: tuple[int, int]) -> None:
        """The pass has reached the first routed layer, with these B x S positions."""
        self._shape = shape

    def __enter__(self) -> Self:
        if self._shape is not None or self._chosen:
            raise RuntimeError("this context has seen its forward pass; make another")
        with ExitStack() as stack:
            stack.enter_context(_positions(self.routers[0], self.over))
            for router in self.routers:
                stack.enter_context(observed(router, self))
            for module in self._model.modules():
                if getattr(module, "gradient_checkpointing", False) and hasattr(module, _CHECKPOINT):
                    stack.enter_context(_bound_to(self, module))
            self._contexts = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.close()
        missing = [router for router in self.routers if router.module not in self._chosen]
        if error is None and missing:
            raise RoutingError(
                f"{len(missing)} of {len(self.routers)} routers did not run while routes were {self._verb}, "
                f"{missing[0]} for one.",
                mend="Make one forward pass of this model, through all its layers, inside the context.",
            )


class Recording(_Pass):
    """What `record_routes` gives."""

    _verb = "recorded"

    @property
    def routes(self) -> NDArray[np.int16]:
        """The experts every position asked, `[B, S, L, K]`; -1 fills up routers that ask fewer than K."""
        return self._gather(self._chosen)


class Replay(_Pass):
    """What `replay_routes` gives."""

    _verb = "replayed"

    def __init__(self, model: nn.Module, routes: Routes | Tensor, *, keep_live: bool = False) -> None:
        super().__init__(model)
        self._live: dict[nn.Module, Tensor] | None = {} if keep_live else None
        routes_BSLK = routes.detach().cpu().numpy() if isinstance(routes, Tensor) else np.asarray(routes)
        check_routes(routes_BSLK, self.layers)
        if routes_BSLK.ndim != 4:
            raise RoutingError(
                f"routes have shape {routes_BSLK.shape}; expected [batch, positions, routers, experts].",
                mend="Build them with modeseek_ray.routing.wire.batch_routes.",
            )
        _check_groups(routes_BSLK, self.routers)
        self._positions: tuple[int, int] = routes_BSLK.shape[:2]
        self._routes_NLK = torch.from_numpy(routes_BSLK.astype(np.int16)).flatten(0, 1)
        self._index = {router.module: router.index for router in self.routers}

    def over(self, shape: tuple[int, int]) -> None:
        if shape != self._positions:
            raise RoutingError(
                f"routes are for {self._positions} samples and positions, the forward pass has {shape}.",
                mend="Give every position a row, padding too (-1): modeseek_ray.routing.wire.batch_routes.",
            )
        super().over(shape)

    @property
    def live_routes(self) -> NDArray[np.int16]:
        """What the routers would have asked by themselves, `[B, S, L, K]`, after layers that replayed."""
        return self._gather(self._live or {})

    def live(self, router: Router) -> Tensor:
        if self._live is None:
            raise RuntimeError("the live choice was not kept: replay_routes(…, keep_live=True)")
        return self._live[router.module]

    def took(self, router: Router, index_NK: Tensor, live_NK: Tensor) -> None:
        super().took(router, index_NK, live_NK)
        if self._live is not None:
            self._live[router.module] = live_NK.to(torch.int16)

    def given(self, router: Router, num_tokens: int, device: torch.device) -> Tensor:
        if num_tokens != len(self._routes_NLK):
            raise RoutingError(
                f"{router} chooses for {num_tokens} tokens; routes are for {len(self._routes_NLK)}.",
                mend="This architecture does not route every position once; drop `routing_replay`.",
            )
        self._routes_NLK = self._routes_NLK.to(device)
        return self._routes_NLK[:, self._index[router.module], : router.top_k].long()


class _Again(Observer):
    """The recomputation of part of a pass: every router asks what it asked then, and nobody counts it."""

    alone = True

    def __init__(self, first: _Pass) -> None:
        self._first = first

    def given(self, router: Router, num_tokens: int, device: torch.device) -> Tensor:
        return self._first.chosen(router).long()


@contextmanager
def _again(first: _Pass) -> Iterator[None]:
    with ExitStack() as stack:
        for router in first.routers:
            stack.enter_context(observed(router, _Again(first)))
        yield


class _BoundCheckpoint:
    """Stands in for a layer's checkpoint function, so that it recomputes under the pass it was called in."""

    def __init__(self, module: nn.Module) -> None:
        self.replaced: Callable[..., Any] = getattr(module, _CHECKPOINT)
        self.passes: list[_Pass] = []
        options = self.replaced.keywords if isinstance(self.replaced, functools.partial) else {}
        self._context_fn = options.get("context_fn", noop_context_fn)
        self._known = (
            getattr(self.replaced, "func", None) is checkpoint and options.get("use_reentrant") is False
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.replaced(*args, **kwargs)
        if not self._known:
            raise RoutingError(
                "gradient checkpointing of this kind would choose experts anew when it recomputes.",
                mend='Enable it with gradient_checkpointing_kwargs={"use_reentrant": False}.',
            )
        last = self.passes[-1]  # an earlier one saw the same choices

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            forward, recompute = self._context_fn()
            return forward, _both(recompute, _again(last))

        return self.replaced(*args, context_fn=contexts, **kwargs)


@contextmanager
def _bound_to(observer: _Pass, module: nn.Module) -> Iterator[None]:
    """Within it the layer's recomputations are those of `observer`'s pass."""
    function = getattr(module, _CHECKPOINT)
    bound = function if isinstance(function, _BoundCheckpoint) else _BoundCheckpoint(module)
    setattr(module, _CHECKPOINT, bound)
    bound.passes.append(observer)
    try:
        yield
    finally:
        bound.passes.remove(observer)
        if not bound.passes:
            setattr(module, _CHECKPOINT, bound.replaced)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


@contextmanager
def _positions(router: Router, tell: Callable[[tuple[int, int]], None]) -> Iterator[None]:
    """Tell the B x S positions of a pass when it reaches the router's layer: routers see them flattened."""

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args[:1], kwargs.get("hidden_states"), *args[1:], *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point():
                return tell((value.shape[0], value.shape[1]))
        raise RoutingError(
            f"the layer of {router} is not handed [batch, positions, width].",
            mend="This architecture cannot be replayed; drop `routing_replay`.",
        )

    hook = router.layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _check_groups(routes_BSLK: Routes, routers: list[Router]) -> None:
    """Refuse rows whose experts lie in more groups than a group-limited router may admit."""
    for router in routers:
        if router.num_groups:
            group_NK = routes_BSLK[:, :, router.index, : router.top_k].reshape(-1, router.top_k)
            group_NK = np.sort(group_NK // (router.num_experts // router.num_groups), axis=1)
            num_groups_N = 1 + (group_NK[:, 1:] != group_NK[:, :-1]).sum(axis=1)
            if len(group_NK) and num_groups_N.max() > router.top_groups:
                raise RoutingError(
                    f"routes of {router} lie in {num_groups_N.max()} groups of experts; it admits {router.top_groups}.",
                    mend="Replay routes of this very model, as they were recorded.",
                )
