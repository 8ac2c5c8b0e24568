"""Several optimizer steps on one weighed batch: mini-batches, and one report of all their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeseek_ray.types import FloatArray, Group, IntArray, StepReport


@dataclass(frozen=True)
class MiniBatch:
    """Some samples of a batch, with their weights in the order of the groups."""

    groups: list[Group]
    values_N: FloatArray


def parts_of(num_samples: int, count: int, *, seed: tuple[int, int]) -> list[IntArray]:
    """Positions in a batch of `count` parts of nearly equal size, shuffled by `seed`; known before any weight is.

    >>> [part.tolist() for part in parts_of(3, 1, seed=(0, 0))]
    [[0, 1, 2]]
    """
    if count <= 1:
        return [np.arange(num_samples)]
    order_N = np.random.default_rng(seed).permutation(num_samples)
    return [np.sort(part) for part in np.array_split(order_N, min(count, num_samples))]


def mini_batches(
    groups: Sequence[Group], values_N: FloatArray, count: int, *, seed: tuple[int, int]
) -> list[MiniBatch]:
    """Cut a weighed batch into its `parts_of`.

    Weights are taken over unchanged: they were normalised over the whole batch. A group may be cut,
    because what held it together, its rewards' comparison, is in the weights already. One part is
    the batch itself, in its own order.
    """
    if count <= 1:
        return [MiniBatch(list(groups), values_N)]
    ends = np.cumsum([len(g) for g in groups])
    parts = []
    for chosen_N in parts_of(len(values_N), count, seed=seed):
        of_group_N = np.searchsorted(ends, chosen_N, side="right")
        taken = [
            groups[g].take(chosen_N[of_group_N == g] - (ends[g] - len(groups[g])))
            for g in np.unique(of_group_N)
        ]
        parts.append(MiniBatch(taken, values_N[chosen_N]))
    return parts


def merge_reports(reports: Sequence[StepReport]) -> StepReport:
    """One report of a batch's inner steps: sums and means over its tokens; the largest gradient norm.

    `figures` are means over the steps, but for those whose name says maximum.
    """
    if len(reports) == 1:
        return reports[0]
    tokens = np.array([r.num_tokens for r in reports], dtype=np.float64)

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=np.maximum(tokens, 1)))

    kls = [r.kl_nats for r in reports if r.kl_nats is not None]
    entropies = [r.entropy for r in reports if r.entropy is not None]
    clipped = [r.grad_norm_clipped for r in reports if r.grad_norm_clipped is not None]
    names = {name for r in reports for name in r.figures}
    parts = {name for r in reports for name in r.seconds}
    figures = {}
    for name in sorted(names):
        values = [r.figures[name] for r in reports if name in r.figures]
        figures[name] = max(values) if "max" in name else float(np.mean(values))
    return StepReport(
        step=reports[0].step,
        loss=float(np.mean([r.loss for r in reports])),
        nll=mean([r.nll for r in reports]),
        accuracy=mean([r.accuracy for r in reports]),
        grad_norm=max(r.grad_norm for r in reports),
        learning_rate=reports[0].learning_rate,
        num_tokens=int(tokens.sum()),
        num_padded=sum(r.num_padded for r in reports),
        num_positions=sum(r.num_positions for r in reports),
        grad_norm_clipped=max(clipped) if clipped else None,
        kl_nats=mean(kls) if len(kls) == len(reports) else None,
        entropy=mean(entropies) if len(entropies) == len(reports) else None,
        seconds={part: sum(r.seconds.get(part, 0.0) for r in reports) for part in sorted(parts)},
        figures=figures,
    )
