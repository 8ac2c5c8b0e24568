"""One router's choice of experts, observed and, where routes are given, answered.

    N  tokens the router sees     E  experts     K  experts per token     G  groups of experts

While anybody observes a router its `forward` runs under a `TorchFunctionMode` that answers `topk` over all
its experts: with the given indices, and with the *live* scores gathered at them. So gate values and their
gradients are those of the current weights, whatever the architecture makes of them (softmax before or
after the choice, sigmoid, correction bias, scaling); only the choice is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modeseek_ray.errors import RoutingError
from modeseek_ray.routing.describe import Router
from modeseek_ray.routing.wire import LIVE


class Observer:
    """What a forward pass under observation is asked and told. This one watches and keeps nothing."""

    alone = False  # whether observers that came earlier are left out

    def given(self, router: Router, num_tokens: int, device: torch.device) -> Tensor | None:
        """The experts to ask, int64 [N, K], in rows of -1 the router's own; None = its own everywhere."""
        return None

    def took(self, router: Router, index_NK: Tensor, live_NK: Tensor) -> None:
        """The router's forward is over; it asked these, and by itself would have asked `live_NK`."""


@contextmanager
def observed(router: Router, observer: Observer) -> Iterator[None]:
    """Within it `observer` is asked about every run of the router. The last to come has the last word."""
    module = router.module
    forward = vars(module).get("forward")
    watch = forward if isinstance(forward, _Watched) else _Watched(router, forward)
    module.forward = watch
    watch.observers.append(observer)
    try:
        yield
    finally:
        watch.observers.remove(observer)
        if not watch.observers:
            del module.forward
            if watch.replaced is not None:
                module.forward = watch.replaced


class _Watched:
    """Stands in for a router's `forward`: an attribute of the instance, inside whatever hooks the module has."""

    def __init__(self, router: Router, replaced: Callable[..., Any] | None) -> None:
        self.router = router
        self.replaced = replaced
        self.forward: Callable[..., Any] = router.module.forward
        self.observers: list[Observer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        last = self.observers[-1]
        observers = [last] if last.alone else list(self.observers)
        with _Choice(self.router, observers) as choice:
            output = self.forward(*args, **kwargs)
        if choice.index_NK is None or choice.live_NK is None:
            raise RoutingError(
                f"{self.router} did not choose {self.router.top_k} of {self.router.num_experts} experts by `topk`.",
                mend="This architecture routes in a way that cannot be replayed; drop `routing_replay`.",
            )
        for observer in observers:
            observer.took(self.router, choice.index_NK, choice.live_NK)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError(
            "copy a model before or after recording and replaying: this copy would run the original"
        )


class _Choice(TorchFunctionMode):
    """Active during one run of a router. Some call `topk` several times; the last over all experts counts."""

    def __init__(self, router: Router, observers: Sequence[Observer]) -> None:
        super().__init__()
        self._router = router
        self._observers = observers
        self.index_NK: Tensor | None = None
        self.live_NK: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.topk or func is torch.Tensor.topk:
            return self._topk(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _topk(
        self, func: Any, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> Any:
        """Values are gathered even where the choice is the router's own: the backward pass then needs the
        same saved tensors whether a pass is recorded, replayed or recomputed, which checkpointing insists on."""
        router, wanted = self._router, (input.shape[dim], k)
        is_last = dim % input.ndim == input.ndim - 1
        if is_last and wanted == (router.num_experts, router.top_k):
            choose: Callable[[Tensor], Tensor] = self._experts
        elif is_last and input.ndim == 2 and wanted == (router.num_groups, router.top_groups):
            choose = self._groups
        else:
            return func(input, k, dim, largest, sorted)
        with torch.no_grad():
            live: Tensor = func(input, k, dim, largest, sorted).indices
            index = choose(live.reshape(-1, k)).reshape(live.shape)
        return torch.return_types.topk((input.gather(dim, index), index))

    def _experts(self, live_NK: Tensor) -> Tensor:
        given_NK = self._given(live_NK)
        self.live_NK = live_NK
        self.index_NK = torch.where(given_NK[:, :1] == LIVE, live_NK, given_NK)
        return self.index_NK

    def _groups(self, live_Ng: Tensor) -> Tensor:
        """Groups that admit the given experts, filled up with the router's own. DeepSeek-V2 gives experts
        outside the admitted groups a gate of zero, which would not be the live gate."""
        router = self._router
        given_NK = self._given(live_Ng)
        group_NK = given_NK.clamp(min=0) // (router.num_experts // router.num_groups)
        rank_NG = torch.zeros(len(live_Ng), router.num_groups, device=live_Ng.device)
        rank_NG = rank_NG.scatter(1, live_Ng, 1.0).scatter(1, group_NK, 2.0)
        return torch.where(given_NK[:, :1] == LIVE, live_Ng, rank_NG.topk(router.top_groups, dim=1).indices)

    def _given(self, live: Tensor) -> Tensor:
        """What the observers give, [N, K], the later over the earlier; rows of -1 where nobody does."""
        given_NK = torch.full((len(live), self._router.top_k), LIVE, dtype=torch.int64, device=live.device)
        for observer in self._observers:
            index_NK = observer.given(self._router, len(live), live.device)
            if index_NK is not None:
                given_NK = torch.where(index_NK[:, :1] == LIVE, given_NK, index_NK)
        return given_NK
