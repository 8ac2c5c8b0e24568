"""Split a global batch over ranks, call all of them, merge what they answer in order.

The pool does not know whether its ranks are Ray actors or objects in this process: both answer
`call(method, *args)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.dealing import BegunBatch, Deal, Shard, deal_parts, regroup, split
from actors.merging import sum_reports, summarise, with_sum_delta
from actors.messages import RankBeginning, RankEvaluation, RankReport
from actors.weight_chunks import ChunkFacts
from actors.workers import Worker, together
from modeseek_ray.types import EvalReport, Group, IntArray, StepPlan, StepReport


class TrainerPool:
    """`roles.Trainer` over data-parallel ranks. Every rank gets every call, in the same order.

    `ranks_per_group` neighbours share their samples (resources.sequence_parallel): they are handed the same
    ones and all know the same about them, so that the first of each group speaks for it.
    """

    def __init__(self, ranks: Sequence[Worker], deal: Deal, ranks_per_group: int = 1) -> None:
        if len(ranks) % ranks_per_group:
            raise ValueError(f"{len(ranks)} ranks in groups of {ranks_per_group}")
        self._ranks = ranks
        self._ranks_per_group = ranks_per_group
        self._num_groups = len(ranks) // ranks_per_group
        self._deal = deal
        self._begun: BegunBatch | None = None

    async def setup(self) -> Mapping[str, Any]:
        """Load the model on every rank. Returns rank 0's facts (parameters, versions, device)."""
        facts: Mapping[str, Any] = (await self._all("setup"))[0]
        return facts

    async def remember_start(self, probes: Sequence[Group]) -> None:
        shards, blocks = self._split(probes)
        await self._each("remember_start", [(s.picks, *blocks) for s in shards])

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        return await self._scored(groups, "score")

    async def score_live(self, groups: Sequence[Group]) -> list[Group]:
        """`score` without replayed routes: what somebody computes who loads the export."""
        return await self._scored(groups, "score_live")

    async def _scored(self, groups: Sequence[Group], method: str) -> list[Group]:
        shards, blocks = self._split(groups)
        answers = await self._each(method, [(s.picks, *blocks) for s in shards])
        log_policy_N = np.empty(sum(len(g) for g in groups))
        for shard, log_prob_n in zip(shards, answers, strict=True):
            log_policy_N[shard.order_N] = log_prob_n
        return regroup(groups, log_policy_N, "log_policy_N")

    async def begin(self, groups: Sequence[Group], parts: Sequence[IntArray] | None = None) -> list[Group]:
        self._begun = None
        whole = [np.arange(sum(len(g) for g in groups))]
        shards, blocks = split(
            groups,
            self._num_groups,
            lambda length_N, count: deal_parts(length_N, count, parts or whole, self._deal),
        )
        answers: list[RankBeginning] = await self._each("begin", [(s.picks, *blocks) for s in shards])
        self._begun = BegunBatch.of(groups, shards, blocks, RankBeginning.figures(answers))
        log_policy_N, sum_delta_N, distance_N = np.full((3, len(whole[0])), np.nan)
        for shard, answer in zip(shards, answers, strict=True):
            log_policy_N[shard.order_N] = answer.log_policy_N
            if answer.sum_delta_N is not None:
                sum_delta_N[shard.order_N] = answer.sum_delta_N
            if answer.distance_N is not None:
                distance_N[shard.order_N] = answer.distance_N
        scored = regroup(groups, log_policy_N, "log_policy_N")
        if not np.isnan(distance_N).any():
            scored = regroup(scored, distance_N, "distance_N")
        if np.isnan(sum_delta_N).all():
            return scored
        return [with_sum_delta(g) for g in regroup(scored, sum_delta_N, "sum_delta_N")]

    async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
        """Samples that were begun stay on the rank that keeps their past. A rank may get none."""
        shares = None if self._begun is None else self._begun.deal(groups, self._num_groups)
        shards, blocks = split(groups, self._num_groups, self._deal if shares is None else lambda *_: shares)
        reports: list[RankReport] = await self._each(
            "step",
            [(s.picks, replace(plan, values_N=plan.values_N[s.order_N]), *blocks) for s in shards],
        )
        figures = {} if self._begun is None or shares is None else self._begun.figures
        return sum_reports(plan, reports, figures)

    async def evaluate(self, groups: Sequence[Group], *, kl: bool = False) -> EvalReport:
        shards, blocks = self._split(groups)
        parts = await self._each("evaluate", [(s.picks, kl, *blocks) for s in shards])
        return summarise(RankEvaluation.merge(parts, np.concatenate([s.order_N for s in shards])))

    async def distance_from_start(self) -> float:
        return float((await self._all("distance_from_start"))[0])

    async def save(self, directory: Path) -> None:
        await self._all("save", str(directory))

    async def load(self, directory: Path) -> str | None:
        self._begun = None
        note: str | None = (await self._all("load", str(directory)))[0]
        return note

    async def export(self, directory: Path) -> None:
        await self._all("export", str(directory))

    async def weights(self) -> tuple[list[Any], ChunkFacts]:
        """Handles on the chunks of rank 0's weights, and the facts about them. Await before the next `step`."""

        async def stream(rank: Worker) -> tuple[list[Any], ChunkFacts]:
            handles = [handle async for handle in rank.stream("weights", rank.copies_stream)]
            return handles[:-1], await rank.fetch(handles[-1])

        return (await together([stream(rank) for rank in self._ranks]))[0]  # type: ignore[no-any-return]

    async def join_transfer(self, address: str, port: int, world_size: int) -> None:
        await self._all("join_transfer", address, port, world_size)

    async def describe_transfer(self) -> Mapping[str, Any]:
        facts: Mapping[str, Any] = (await self._all("describe_transfer"))[0]
        return facts

    async def send_weights(self) -> None:
        await self._all("send_weights")

    async def cards(self) -> list[str]:
        """The UUID of every rank's GPU."""
        return await together([rank.call("card") for rank in self._ranks])

    async def lend_weights(self, layer: int, cards: Collection[str]) -> Mapping[str, Any] | None:
        """A layer as every rank lends it on its own GPU, in one update for vLLM; None behind the last."""
        answers = await together([rank.call("lend_weights", layer, cards) for rank in self._ranks])
        if answers[0] is None:
            return None
        handles = {name: handle for answer in answers for name, handle in answer["ipc_handles"].items()}
        return {**answers[0], "ipc_handles": handles}

    async def take_weights_back(self) -> None:
        await self._all("take_weights_back")

    async def free_cache(self) -> None:
        """Before engines on the ranks' GPUs wake up."""
        await self._all("free_cache")

    async def canary(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]:
        """Log-probability of each token but the first, at temperature one, nats."""
        return (await self._all("canary", sequences))[0]  # type: ignore[no-any-return]

    async def weights_sha256(self) -> str:
        """The hash of the trained weights, gathered: equal hashes mean equal bits."""
        return str((await self._all("weights_sha256"))[0])

    async def close(self) -> None:
        await asyncio.gather(*(rank.stop() for rank in self._ranks), return_exceptions=True)

    def _split(self, groups: Sequence[Group]) -> tuple[list[Shard], list[Any]]:
        return split(groups, self._num_groups, self._deal)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return await self._each(method, [args] * self._num_groups)

    async def _each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call every rank, with its group's arguments; the groups' answers."""
        per_rank = [args for args in arguments for _ in range(self._ranks_per_group)]
        answers = await together(
            [rank.call(method, *args) for rank, args in zip(self._ranks, per_rank, strict=True)]
        )
        return answers[:: self._ranks_per_group]
