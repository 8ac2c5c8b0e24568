"""The reference pool for samples as they come: frozen models behind `roles.Scorer`.

Micro-batches are cut from the data alone and then dealt over the workers, so that one scorer or
four give the same bits. (A whole data set goes through `scoring.py`, before trainers are placed.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.dealing import regroup, split
from actors.messages import Pick
from actors.workers import Worker
from modeseek_ray.data.batching import pack
from modeseek_ray.types import Group, Handle, IntArray


class ScorerPool:
    """Workers around `reference.ReferenceModel`. Nothing is lost with a worker: its calls are pure."""

    def __init__(
        self, workers: Sequence[Worker], micro_batch_tokens: int, *, with_routes: bool = False
    ) -> None:
        """`micro_batch_tokens` (most positions computed at once) and `with_routes` as in the workers' `ScoringSpec`."""
        self._workers = workers
        self._micro_batch_tokens = micro_batch_tokens
        self._with_routes = with_routes

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """With routes the groups' handles lead to copies of the samples that carry them."""
        if not groups:
            return []
        length_N = np.concatenate([g.length_N for g in groups])
        cuts = pack(length_N, self._micro_batch_tokens)
        shards, blocks = split(groups, len(cuts), lambda _lengths, _count: cuts)
        log_prob_N = np.empty(len(length_N))
        routes: list[Any] = [None] * len(cuts)  # of each shard: handles, the driver never holds them

        async def score(worker: Worker, mine: Sequence[int]) -> None:
            for j in mine:
                if self._with_routes:
                    answer = [h async for h in worker.stream("score_routed", shards[j].picks, *blocks)]
                    log_prob_N[shards[j].order_N], routes[j] = await worker.fetch(answer[0]), answer[1]
                else:
                    log_prob_N[shards[j].order_N] = await worker.call("score", shards[j].picks, *blocks)

        shares: list[IntArray] = np.array_split(np.arange(len(cuts)), len(self._workers))
        await asyncio.gather(
            *(score(w, [int(j) for j in s]) for w, s in zip(self._workers, shares, strict=True))
        )
        scored = regroup(groups, log_prob_N, "log_reference_N")
        if not self._with_routes:
            return scored
        picks: list[Pick] = [(0, 0)] * len(length_N)
        for shard in shards:
            for n, pick in zip(shard.order_N, shard.picks, strict=True):
                picks[int(n)] = pick
        orders = [shard.order_N for shard in shards]
        [block] = [
            handle
            async for handle in self._workers[0].stream("with_start_routes", picks, orders, *blocks, *routes)
        ]
        ends = np.cumsum([len(g) for g in groups])
        return [
            replace(g, payload=Handle(block, np.arange(end - len(g), end)))
            for g, end in zip(scored, ends, strict=True)
        ]

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._workers), return_exceptions=True)
