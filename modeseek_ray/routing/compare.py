"""How far two runs of an MoE model are apart: in the experts they ask, and in what they then say. Numpy.

    T  tokens     L  routers     K  experts per token     E  experts

An engine and a trainer with the same weights still differ in rounding, and a rounding error can change
an expert. What is reported at scale without replay: about 10 % of the routers of a token differ, 94 % of
tokens in at least one layer, and replay halves the KL between both (2510.11370).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.errors import RoutingError
from modeseek_ray.routing.wire import LIVE, Routes
from modeseek_ray.types import FloatArray, IntArray

_FAR = np.log(2.0)  # a token whose two probabilities differ by more than this factor of two


@dataclass(frozen=True)
class RouteDifference:
    """Two choices of experts for the same tokens. The order of a token's experts does not count."""

    overlap: float  # experts in common, of K; mean over tokens and routers
    share_differing: float  # of token-routers: another set of experts
    share_tokens_changed: float  # of tokens: another set in at least one router
    share_differing_L: FloatArray  # the first of the two shares, router by router
    num_tokens: int  # compared: those with a route on both sides in some router
    num_token_layers: int  # token-routers compared

    def metrics(self, prefix: str = "routing") -> dict[str, float]:
        """Flat names, for the metrics of a step."""
        return {
            f"{prefix}/overlap": self.overlap,
            f"{prefix}/share_differing": self.share_differing,
            f"{prefix}/share_tokens_changed": self.share_tokens_changed,
        }


def compare_routes(one: Routes, other: Routes) -> RouteDifference:
    """Compare routes `[..., L, K]` of the same tokens; rows of -1 on either side are left out.

    A router that asks fewer than K experts has its rows filled up with -1 on both sides.
    Raises `RoutingError` for different shapes.

    >>> difference = compare_routes(np.array([[[0, 1], [2, 3]]]), np.array([[[1, 0], [2, 5]]]))
    >>> difference.overlap, difference.share_differing, difference.share_tokens_changed
    (0.75, 0.5, 1.0)
    """
    if one.shape != other.shape or one.ndim < 2:
        raise RoutingError(
            f"routes of shapes {one.shape} and {other.shape} cannot be compared.",
            mend="Give both for the same tokens and the same model.",
        )
    width = one.shape[-1]
    one_TLK, other_TLK = (a.astype(np.int32).reshape(-1, *a.shape[-2:]) for a in (one, other))
    known_TL = (one_TLK[..., 0] != LIVE) & (other_TLK[..., 0] != LIVE)
    used_TLK = one_TLK != LIVE
    common_TL = ((one_TLK[..., :, None] == other_TLK[..., None, :]) & used_TLK[..., None]).sum((-1, -2))
    size_TL = np.maximum(1, np.minimum(width, used_TLK.sum(-1)))
    differs_TL = known_TL & (common_TL < size_TL)
    tokens_T = known_TL.any(-1)
    return RouteDifference(
        overlap=_share((common_TL / size_TL)[known_TL].sum(), known_TL.sum(), empty=1.0),
        share_differing=_share(differs_TL.sum(), known_TL.sum()),
        share_tokens_changed=_share(differs_TL.any(-1).sum(), tokens_T.sum()),
        share_differing_L=differs_TL.sum(0) / np.maximum(1, known_TL.sum(0)),
        num_tokens=int(tokens_T.sum()),
        num_token_layers=int(known_TL.sum()),
    )


@dataclass(frozen=True)
class Mismatch:
    """How differently two programs rate the same tokens, which the first of them wrote."""

    writer: str  # the tokens are its samples
    reader: str
    kl_nats: float  # KL(writer || reader) per token, estimated by k3
    share_far: float  # of tokens: one probability more than twice the other
    mean_abs: float  # |log p - log q|, nats
    max_abs: float
    num_tokens: int

    def metrics(self, prefix: str = "mismatch") -> dict[str, float]:
        """Flat names that say whose samples they are: `mismatch/engine_trainer/kl_nats`."""
        names = ("kl_nats", "share_far", "mean_abs", "max_abs")
        return {f"{prefix}/{self.writer}_{self.reader}/{name}": getattr(self, name) for name in names}


def mismatch(
    log_p_T: NDArray[np.floating], log_q_T: NDArray[np.floating], *, writer: str, reader: str
) -> Mismatch:
    """Compare log-probabilities (nats) of tokens that were drawn from p, by `writer`; q is `reader`'s.

    k3 = q/p - 1 - log(q/p): never negative, and KL(p || q) in expectation under p alone, so the order
    of arguments matters (Schulman 2020). Raises `RoutingError` for other lengths or non-finite values.

    >>> result = mismatch(np.log([.5, .4]), np.log([.25, .1]), writer="engine", reader="trainer")
    >>> round(result.kl_nats, 6), result.share_far  # (ln 2 - 1/2 + ln 4 - 3/4) / 2; a factor of just two is not far
    (0.414721, 0.5)
    """
    log_p_T, log_q_T = np.asarray(log_p_T, dtype=np.float64), np.asarray(log_q_T, dtype=np.float64)
    if log_p_T.shape != log_q_T.shape or log_p_T.ndim != 1:
        raise RoutingError(
            f"{writer} rated {log_p_T.shape} tokens and {reader} {log_q_T.shape}.",
            mend="Compare the trained tokens of the same samples.",
        )
    delta_T = log_q_T - log_p_T
    if not np.isfinite(delta_T).all():
        place = int(np.flatnonzero(~np.isfinite(delta_T))[0])
        raise RoutingError(
            f"token {place}: {writer} says {log_p_T[place]}, {reader} {log_q_T[place]}.",
            mend="Log-probabilities must be finite; look for a masked or untrained token.",
        )
    far_T = np.abs(delta_T) > _FAR * (1 + 1e-9)
    count = max(1, len(delta_T))
    return Mismatch(
        writer=writer,
        reader=reader,
        kl_nats=float((np.expm1(delta_T) - delta_T).sum() / count),
        share_far=float(far_T.sum() / count),
        mean_abs=float(np.abs(delta_T).sum() / count),
        max_abs=float(np.abs(delta_T).max(initial=0.0)),
        num_tokens=len(delta_T),
    )


@dataclass(frozen=True)
class RouterLoad:
    """How evenly the routers of a model use their experts."""

    counts_L: tuple[IntArray, ...]  # tokens each expert was asked for, router by router
    variation_L: FloatArray  # standard deviation of the counts over their mean; 0 = even
    num_dead_L: IntArray  # experts nobody asked

    @classmethod
    def of(cls, counts_L: Sequence[IntArray]) -> RouterLoad:
        """From the counts themselves."""
        mean_L = np.array([max(c.mean(), 1e-300) for c in counts_L])
        return cls(
            counts_L=tuple(counts_L),
            variation_L=np.array([c.std() for c in counts_L]) / mean_L,
            num_dead_L=np.array([int((c == 0).sum()) for c in counts_L], dtype=np.int64),
        )

    def metrics(self, prefix: str = "routing") -> dict[str, float]:
        """Flat names, for the metrics of a step."""
        return {
            f"{prefix}/load_variation": float(self.variation_L.mean()) if len(self.variation_L) else 0.0,
            f"{prefix}/load_variation_max": float(self.variation_L.max(initial=0.0)),
            f"{prefix}/dead_experts": float(self.num_dead_L.sum()),
        }


def router_load(routes: Routes, num_experts: int | Sequence[int]) -> RouterLoad:
    """Count how often each expert was asked in routes `[..., L, K]`; entries of -1 ask nobody.

    Experts that are asked by no token of a *large* batch are dead; in a small one they may be unlucky.

    >>> load = router_load(np.array([[[0, 1]], [[0, 2]]]), num_experts=4)
    >>> load.counts_L[0].tolist(), load.num_dead_L.tolist(), load.variation_L.round(6).tolist()
    ([2, 1, 1, 0], [1], [0.707107])
    """
    routers = routes.shape[-2]
    sizes = [num_experts] * routers if isinstance(num_experts, int) else list(num_experts)
    flat_NLK = routes.reshape(-1, *routes.shape[-2:]).astype(np.int64)
    counts_L = []
    for router, size in enumerate(sizes):
        asked = flat_NLK[:, router][flat_NLK[:, router] != LIVE]
        if asked.size and not 0 <= asked.min() <= asked.max() < size:
            raise RoutingError(
                f"router {router} has {size} experts, its routes name {asked.max()}.",
                mend="Give the number of experts of the model the routes were recorded on.",
            )
        counts_L.append(np.bincount(asked, minlength=size).astype(np.int64))
    return RouterLoad.of(counts_L)


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return float(part / whole) if whole else empty
