"""Cutting a global batch: which rank computes which samples, and in which micro-batches.

Both functions look at lengths alone and are deterministic, so every run, and every resumed run,
cuts the same batch the same way.
"""

from __future__ import annotations

import heapq

import numpy as np

from modeseek_ray.types import IntArray

# A micro-batch costs something besides its positions (launching kernels, gathering parameters). It
# is priced at this share of the largest micro-batch, so that samples are not all computed alone.
FIXED_COST_SHARE = 1 / 64


def pack(length_N: IntArray, max_tokens: int, max_samples: int | None = None) -> list[IntArray]:
    """Cut samples into micro-batches of similar length.

    A micro-batch computes longest x count positions; that is at most `max_tokens`, except that a
    single longer sample stands alone. Among all cuts of the samples sorted by length the one with
    the fewest positions is taken, each micro-batch also costing `FIXED_COST_SHARE` of `max_tokens`
    (dynamic programming, exact).

    Returns indices into `length_N`, ascending within a micro-batch; the longest samples come first,
    so that running out of memory happens at once. Every index appears exactly once. Raises
    ValueError if a length or a limit is below one.

    >>> [m.tolist() for m in pack(np.array([9, 2, 10, 2, 2]), max_tokens=20)]
    [[2], [0], [1, 3, 4]]
    """
    if max_tokens < 1 or (max_samples is not None and max_samples < 1):
        raise ValueError(f"limits must be at least one: max_tokens={max_tokens}, max_samples={max_samples}")
    length_N = np.asarray(length_N, dtype=np.int64)
    num_samples = len(length_N)
    if num_samples == 0:
        return []
    if length_N.min() < 1:
        raise ValueError("every sample has at least one token")
    order_N = np.argsort(-length_N, kind="stable")
    sorted_N = length_N[order_N]
    fixed_cost = max_tokens * FIXED_COST_SHARE

    # cost[i]: cheapest cut of samples i.. in sorted order, whose first micro-batch ends before end[i]
    cost = np.zeros(num_samples + 1)
    end = np.zeros(num_samples, dtype=np.int64)
    for i in range(num_samples - 1, -1, -1):
        longest = int(sorted_N[i])
        most = max(1, max_tokens // longest)
        if max_samples is not None:
            most = min(most, max_samples)
        count = np.arange(1, min(most, num_samples - i) + 1)
        total = longest * count + cost[i + count]
        best = len(total) - 1 - int(np.argmin(total[::-1]))  # of equal cuts the fullest
        cost[i] = total[best] + fixed_cost
        end[i] = i + best + 1

    micro_batches, i = [], 0
    while i < num_samples:
        micro_batches.append(np.sort(order_N[i : end[i]]))
        i = int(end[i])
    return micro_batches


def deal(length_N: IntArray, num_ranks: int) -> list[IntArray]:
    """Say which samples each rank computes, balanced by tokens: longest first to the least loaded.

    The heaviest rank carries at most (4/3 - 1/(3 ranks)) of the best possible (Graham 1969). Ties go
    to the rank with fewer samples, so equal lengths give counts that differ by at most one. Ranks
    may get none. Returns ascending indices per rank; every index appears exactly once.

    >>> [r.tolist() for r in deal(np.array([5, 1, 4, 2]), num_ranks=2)]
    [[0, 1], [2, 3]]
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least one, not {num_ranks}")
    length_N = np.asarray(length_N, dtype=np.int64)
    loads = [(0, 0, rank) for rank in range(num_ranks)]  # tokens, samples, rank
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in np.argsort(-length_N, kind="stable").tolist():
        tokens, samples, rank = loads[0]
        dealt[rank].append(i)
        heapq.heapreplace(loads, (tokens + int(length_N[i]), samples + 1, rank))
    return [np.array(sorted(indices), dtype=np.int64) for indices in dealt]


def padding_share(
    length_N: IntArray,
    *,
    batch_size: int,
    num_ranks: int,
    max_tokens: int,
    max_samples: int | None = None,
    num_batches: int = 50,
) -> float:
    """Estimated share of computed positions that are padding: random batches, dealt and packed.

    >>> padding_share(np.full(10, 7), batch_size=5, num_ranks=2, max_tokens=100)
    0.0
    """
    order_N = np.random.default_rng(0).permutation(len(length_N))[: batch_size * num_batches]
    computed = used = 0
    for start in range(0, len(order_N), batch_size):
        batch_N = np.asarray(length_N)[order_N[start : start + batch_size]]
        for rank in deal(batch_N, num_ranks):
            mine_N = batch_N[rank]
            computed += sum(int(mine_N[m].max()) * len(m) for m in pack(mine_N, max_tokens, max_samples))
            used += int(mine_N.sum())
    return 1 - used / computed if computed else 0.0
