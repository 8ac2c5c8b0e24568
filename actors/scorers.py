"""The reference pool for samples as they come: frozen models behind `roles.Scorer`.

Micro-batches are cut from the data alone and then dealt over the workers, so that one scorer or
four give the same bits. (A whole data set goes through `scoring.py`, before trainers are placed.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from actors.pools import Worker, regroup, split
from modeseek_ray.data.batching import pack
from modeseek_ray.types import Group, IntArray


class ScorerPool:
    """Workers around `reference.ReferenceModel`. Nothing is lost with a worker: its calls are pure."""

    def __init__(self, workers: Sequence[Worker], micro_batch_tokens: int) -> None:
        """`micro_batch_tokens`: most positions computed at once, as in the workers' `ScoringSpec`."""
        self._workers = workers
        self._micro_batch_tokens = micro_batch_tokens

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        if not groups:
            return []
        length_N = np.concatenate([g.length_N for g in groups])
        cuts = pack(length_N, self._micro_batch_tokens)
        shards, blocks = split(groups, len(cuts), lambda _lengths, _count: cuts)
        log_prob_N = np.empty(len(length_N))

        async def score(worker: Worker, mine: Sequence[int]) -> None:
            for j in mine:
                log_prob_N[shards[j].order_N] = await worker.call("score", shards[j].picks, *blocks)

        shares: list[IntArray] = np.array_split(np.arange(len(cuts)), len(self._workers))
        await asyncio.gather(
            *(score(w, [int(j) for j in s]) for w, s in zip(self._workers, shares, strict=True))
        )
        return regroup(groups, log_prob_N, "log_reference_N")

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._workers), return_exceptions=True)
