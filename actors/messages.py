"""What one rank or scorer answers to its pool: sums and per-sample columns, never means.

The pools add them up over ranks and divide once, so every figure is global and exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.routing.compare import RouterLoad
from modeseek_ray.types import BoolArray, FloatArray, IntArray

# A worker is handed blocks of samples and picks into them: (which block, which sample of it).
# Blocks travel as arguments of their own, so that Ray hands them over by reference.
Pick = tuple[int, int]
Picks = Sequence[Pick]


@dataclass(frozen=True)
class RouteCounts:
    """The trainer's live routes against the sampler's, counted where the sampler's are known.

    >>> (RouteCounts(8, 1, 4, 1, 7.5) + RouteCounts(8, 0, 4, 0, 8.0)).figures()
    {'routes/changed_token_layers': 0.0625, 'routes/changed_tokens': 0.125, 'routes/overlap': 0.96875}
    """

    num_token_layers: int = 0
    num_changed_token_layers: int = 0  # another set of experts
    num_tokens: int = 0
    num_changed_tokens: int = 0  # in at least one layer
    overlap_sum: float = 0.0  # over token-layers: experts in common, of K

    def __add__(self, other: RouteCounts) -> RouteCounts:
        mine, theirs = vars(self).values(), vars(other).values()
        return RouteCounts(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def figures(self) -> dict[str, float]:
        if self.num_tokens == 0:
            return {}
        return {
            "routes/changed_token_layers": self.num_changed_token_layers / self.num_token_layers,
            "routes/changed_tokens": self.num_changed_tokens / self.num_tokens,
            "routes/overlap": self.overlap_sum / self.num_token_layers,
        }


@dataclass(frozen=True)
class RankBeginning:
    """One rank's answer to `begin`: columns in the order of its picks, and sums over their tokens."""

    log_policy_N: FloatArray
    # Of the ratio the objective's `delta_of` names; NaN where its denominator, the sampler, is not known.
    sum_delta_N: FloatArray | None = None
    distance_N: FloatArray | None = None  # KL(pi_0 || pi), nats per trained token, where it was asked for
    mismatch: DeltaSums = field(default_factory=DeltaSums)  # pi_old(trainer) / pi_sampler
    weighting: DeltaSums = field(default_factory=DeltaSums)  # the token ratios behind `sum_delta_N`
    live_mismatch: DeltaSums | None = None  # mismatch without replay, where it was asked for
    routes: RouteCounts | None = None

    @classmethod
    def figures(cls, parts: Sequence[RankBeginning]) -> dict[str, float]:
        """Global figures under flat names (`objectives.deltas.FIGURES`, `RouteCounts`)."""
        live = [p.live_mismatch for p in parts if p.live_mismatch is not None]
        routes = [p.routes for p in parts if p.routes is not None]
        return {
            **sum((p.mismatch for p in parts), DeltaSums()).figures("mismatch"),
            **sum((p.weighting for p in parts), DeltaSums()).figures("weighting"),
            **sum(live, DeltaSums()).figures("mismatch_live"),
            **sum(routes, RouteCounts()).figures(),
        }


def add_loads(
    one_L: tuple[IntArray, ...] | None, other_L: tuple[IntArray, ...] | None
) -> tuple[IntArray, ...] | None:
    """Counts of two passes together; None is a pass that saw no tokens, or a dense model's."""
    if one_L is None or other_L is None:
        return one_L or other_L
    return tuple(a + b for a, b in zip(one_L, other_L, strict=True))


@dataclass(frozen=True)
class RankReport:
    """One rank's share of an optimizer step. Everything is a sum, except the global gradient norm."""

    loss: float  # already divided by the global denominator; ranks add up
    nll_sum: float  # unweighted, nats
    num_correct: int
    num_tokens: int
    num_positions: int
    num_padded: int
    grad_norm: float  # global: equal on all ranks
    grad_norm_clipped: float | None = None  # global, as the optimizer got it
    kl_sum: float | None = None
    entropy_sum: float | None = None  # of the policy over trained positions, nats
    seconds: Mapping[str, float] = field(default_factory=dict)
    ratio: DeltaSums = field(default_factory=DeltaSums)  # pi_theta / pi_old, where the batch was begun
    load_L: tuple[IntArray, ...] | None = None  # MoE: tokens of each expert, router by router, live choice
    balance: float | None = None  # this rank's share of the load-balancing loss, where it is on

    @classmethod
    def routing(cls, parts: Sequence[RankReport]) -> dict[str, float]:
        """How evenly experts are used in the whole batch, and what the balancing loss is."""
        load_L: tuple[IntArray, ...] | None = None
        for part in parts:
            load_L = add_loads(load_L, part.load_L)
        figures = {} if load_L is None else RouterLoad.of(load_L).metrics("routes")
        balances = [p.balance for p in parts if p.balance is not None]
        return {**figures, "routes/balancing_loss": sum(balances)} if balances else figures


@dataclass(frozen=True)
class RankEvaluation:
    """One rank's share of an evaluation: a row per pick, in the order of the picks."""

    nll_N: FloatArray  # summed over trained tokens
    num_correct_N: IntArray
    num_tokens_N: IntArray
    all_correct_N: BoolArray  # every trained token is the argmax: greedy decoding writes this answer
    problem_N: IntArray
    tasks: tuple[str, ...]
    entropy_N: FloatArray | None = None  # of the policy, summed over trained positions, nats
    kl_N: FloatArray | None = None  # forward KL(pi_0 || pi) summed over trained positions, nats
    kl_reverse_N: FloatArray | None = None  # KL(pi || pi_0), likewise

    @classmethod
    def merge(cls, parts: Sequence[RankEvaluation], order_N: IntArray) -> RankEvaluation:
        """Put the ranks' rows back into the order of the groups; `order_N[j]` is where row j belongs."""
        back_N = np.argsort(order_N)

        def rows(name: str) -> np.ndarray:
            return np.concatenate([getattr(p, name) for p in parts])[back_N]

        def known(name: str) -> np.ndarray | None:
            return None if any(getattr(p, name) is None for p in parts) else rows(name)

        tasks = [t for p in parts for t in p.tasks]
        return cls(
            nll_N=rows("nll_N"),
            num_correct_N=rows("num_correct_N"),
            num_tokens_N=rows("num_tokens_N"),
            all_correct_N=rows("all_correct_N"),
            problem_N=rows("problem_N"),
            tasks=tuple(tasks[j] for j in back_N),
            entropy_N=known("entropy_N"),
            kl_N=known("kl_N"),
            kl_reverse_N=known("kl_reverse_N"),
        )
