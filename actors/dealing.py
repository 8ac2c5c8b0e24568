"""Who gets which samples of a global batch.

Nothing here looks at tokens; blocks are handed on as they are, one argument each, so that Ray resolves
references on the worker's side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.messages import Pick
from modeseek_ray.types import FloatArray, Group, IntArray

Deal = Callable[[IntArray, int], Sequence[IntArray]]


@dataclass(frozen=True)
class Shard:
    """One worker's part of a batch: where its samples stand in the batch, and picks into the blocks."""

    order_N: IntArray
    picks: list[Pick]


def split(groups: Sequence[Group], num_workers: int, deal: Deal) -> tuple[list[Shard], list[Any]]:
    """Deal the samples of a batch over workers by length. Returns the shards and the blocks they pick from."""
    positions: dict[int, int] = {}
    blocks: list[Any] = []
    picks: list[Pick] = []
    for group in groups:
        block = group.payload.block
        if id(block) not in positions:
            positions[id(block)] = len(blocks)
            blocks.append(block)
        picks.extend((positions[id(block)], int(j)) for j in group.payload.index_N)
    length_N = np.concatenate([g.length_N for g in groups]) if groups else np.zeros(0, dtype=np.int64)
    shares = deal(length_N, num_workers)
    return [Shard(order_N, [picks[j] for j in order_N]) for order_N in shares], blocks


def regroup(groups: Sequence[Group], values_N: FloatArray, column: str) -> list[Group]:
    """Put a column of the whole batch back into its groups."""
    ends = np.cumsum([len(g) for g in groups])[:-1]
    return [
        g.with_columns(**{column: part}) for g, part in zip(groups, np.split(values_N, ends), strict=True)
    ]


def deal_parts(length_N: IntArray, num_ranks: int, parts: Sequence[IntArray], deal: Deal) -> list[IntArray]:
    """Deal so that each of the parts that will be stepped on is balanced, and all of them together.

    The heaviest share of a part goes to the rank that has least so far. One part is `deal` itself.

    >>> from modeseek_ray.data.batching import deal
    >>> [r.tolist() for r in deal_parts(np.array([9, 1, 8, 2]), 2, [np.array([0, 1]), np.array([2, 3])], deal)]
    [[0, 3], [1, 2]]
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    load_R = np.zeros(num_ranks, dtype=np.int64)
    for part in parts:
        shares = [part[share] for share in deal(length_N[part], num_ranks)]
        if load_R.any():
            shares.sort(key=lambda share: -int(length_N[share].sum()))
        for rank, share in zip(np.argsort(load_R, kind="stable"), shares, strict=True):
            dealt[rank].extend(share.tolist())
            load_R[rank] += length_N[share].sum()
    if sum(map(len, dealt)) != len(length_N):
        raise ValueError(f"the parts hold {sum(map(len, dealt))} samples, the batch {len(length_N)}")
    return [np.array(sorted(positions), dtype=np.int64) for positions in dealt]


@dataclass(frozen=True)
class BegunBatch:
    """Which rank holds which sample of the batch that was begun, and what `begin` measured."""

    blocks: list[Any]  # held, so that their ids stay theirs
    ranks: Mapping[tuple[int, int], list[int]]  # (id of the block, sample) -> the rank of each of its copies
    figures: Mapping[str, float]

    @classmethod
    def of(
        cls, groups: Sequence[Group], shards: Sequence[Shard], blocks: list[Any], figures: Mapping[str, float]
    ) -> BegunBatch:
        ranks: dict[tuple[int, int], list[int]] = {}
        rank_N = np.empty(sum(len(g) for g in groups), dtype=np.int64)
        for rank, shard in enumerate(shards):
            rank_N[shard.order_N] = rank
        for key, rank in zip(_keys(groups), rank_N.tolist(), strict=True):
            ranks.setdefault(key, []).append(rank)
        return cls(blocks, ranks, figures)

    def deal(self, groups: Sequence[Group], num_ranks: int) -> list[IntArray] | None:
        """Each sample to the rank that began it; None if none of them was begun."""
        dealt: list[list[int]] = [[] for _ in range(num_ranks)]
        seen: dict[tuple[int, int], int] = {}
        for position, key in enumerate(_keys(groups)):
            copies = self.ranks.get(key, [])
            if copies:
                dealt[copies[seen.get(key, 0) % len(copies)]].append(position)
            seen[key] = seen.get(key, 0) + 1
        begun = sum(map(len, dealt))
        if begun == 0:
            return None
        if begun < sum(seen.values()):
            raise ValueError(
                f"{begun} of a step's {sum(seen.values())} samples were begun: begin all or none"
            )
        return [np.array(positions, dtype=np.int64) for positions in dealt]


def _keys(groups: Sequence[Group]) -> list[tuple[int, int]]:
    return [(id(g.payload.block), int(j)) for g in groups for j in g.payload.index_N]
