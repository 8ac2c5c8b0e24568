"""Split a global batch over workers, call all of them, merge what they answer in order.

A pool does not know whether its workers are Ray actors or objects in this process: both answer
`call(method, *args)`. Nothing here looks at tokens; blocks are handed on as they are, one argument
each, so that Ray resolves references on the worker's side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.messages import Pick, RankBeginning, RankEvaluation, RankReport
from actors.weight_chunks import ChunkFacts
from modeseek_ray.errors import WorkerError
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.types import EvalReport, FloatArray, Group, IntArray, StepPlan, StepReport

# How long a rank that failed may have been the first to hear that another died.
DEATH_GRACE_S = 10.0

Deal = Callable[[IntArray, int], Sequence[IntArray]]


class Worker(Protocol):
    """One worker process (or object). Calls are executed in the order they are made."""

    # Whether what a method yields to `stream` is copied before the method goes on.
    copies_stream: bool

    async def call(self, method: str, *args: Any) -> Any: ...

    def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """A handle on each thing `method` yields: the thing itself, or a reference that workers are handed."""
        ...

    async def fetch(self, reference: Any) -> Any:
        """What such a handle stands for. Small things only. Raises what `call` would."""
        ...

    async def stop(self) -> None: ...


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


@dataclass(frozen=True)
class _Begun:
    """Which rank holds which sample of the batch that was begun, and what `begin` measured."""

    blocks: list[Any]  # held, so that their ids stay theirs
    ranks: Mapping[tuple[int, int], list[int]]  # (id of the block, sample) -> the rank of each of its copies
    figures: Mapping[str, float]

    @classmethod
    def of(
        cls, groups: Sequence[Group], shards: Sequence[Shard], blocks: list[Any], figures: Mapping[str, float]
    ) -> _Begun:
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
        self._begun: _Begun | None = None

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
        self._begun = _Begun.of(groups, shards, blocks, RankBeginning.figures(answers))
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
        return [_with_sum_delta(g) for g in regroup(scored, sum_delta_N, "sum_delta_N")]

    async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
        """Samples that were begun stay on the rank that keeps their past. A rank may get none."""
        shares = None if self._begun is None else self._begun.deal(groups, self._num_groups)
        shards, blocks = split(groups, self._num_groups, self._deal if shares is None else lambda *_: shares)
        reports: list[RankReport] = await self._each(
            "step",
            [(s.picks, replace(plan, values_N=plan.values_N[s.order_N]), *blocks) for s in shards],
        )
        figures = {} if self._begun is None or shares is None else self._begun.figures
        return _sum_reports(plan, reports, figures)

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

        return (await self._together([stream(rank) for rank in self._ranks]))[0]  # type: ignore[no-any-return]

    async def join_transfer(self, address: str, port: int, world_size: int) -> None:
        await self._all("join_transfer", address, port, world_size)

    async def describe_transfer(self) -> Mapping[str, Any]:
        facts: Mapping[str, Any] = (await self._all("describe_transfer"))[0]
        return facts

    async def send_weights(self) -> None:
        await self._all("send_weights")

    async def cards(self) -> list[str]:
        """The UUID of every rank's GPU."""
        return await self._together([rank.call("card") for rank in self._ranks])

    async def lend_weights(self, layer: int, cards: Collection[str]) -> Mapping[str, Any] | None:
        """A layer as every rank lends it on its own GPU, in one update for vLLM; None behind the last."""
        answers = await self._together([rank.call("lend_weights", layer, cards) for rank in self._ranks])
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
        answers = await self._together(
            [rank.call(method, *args) for rank, args in zip(self._ranks, per_rank, strict=True)]
        )
        return answers[:: self._ranks_per_group]

    async def _together(self, work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """All ranks' answers. The first failure wins: the others may be waiting for it in a collective.

        Unless it is an unforeseen one and a rank turns out to have died: its neighbours hear of that as a
        broken connection, often before we do.
        """
        calls = [asyncio.ensure_future(call) for call in work]
        try:
            return list(await asyncio.gather(*calls))
        except WorkerError as error:
            death = await _death_among(calls) if error.code == "worker_failed" else None
            if death is None:
                raise
            raise death from error
        finally:
            for call in calls:
                call.cancel()


_DEATHS = ("worker_died", "out_of_memory")


async def _death_among(calls: Sequence[asyncio.Future[Any]]) -> WorkerError | None:
    """The error that says that a rank died, if one does so within `DEATH_GRACE_S`."""
    ends = time.monotonic() + DEATH_GRACE_S
    while True:
        for call in calls:
            error = call.exception() if call.done() and not call.cancelled() else None
            if isinstance(error, WorkerError) and error.code in _DEATHS:
                return error
        pending = [call for call in calls if not call.done()]
        left_s = ends - time.monotonic()
        if not pending or left_s <= 0:
            return None
        await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)


def _with_sum_delta(group: Group) -> Group:
    """NaN is a sample whose sampler's log-probabilities nobody knows: 0 for replay rows, which are outside of
    ratios, and no column for a group of others."""
    assert group.sum_delta_N is not None
    unknown_N = np.isnan(group.sum_delta_N)
    is_replay_N = np.zeros(len(group), dtype=np.bool_) if group.is_replay_N is None else group.is_replay_N
    if (unknown_N & ~is_replay_N).any():
        return replace(group, sum_delta_N=None)
    return replace(group, sum_delta_N=np.where(unknown_N, 0.0, group.sum_delta_N))


def _sum_reports(plan: StepPlan, reports: Sequence[RankReport], begun: Mapping[str, float]) -> StepReport:
    """Global figures from the ranks' sums; the slowest rank's seconds. `begun`: figures of the whole batch."""
    num_tokens = sum(r.num_tokens for r in reports)
    kl_sums = [r.kl_sum for r in reports if r.kl_sum is not None]
    entropies = [r.entropy_sum for r in reports if r.entropy_sum is not None]
    parts = sorted({name for r in reports for name in r.seconds})
    return StepReport(
        step=plan.step,
        loss=sum(r.loss for r in reports),
        nll=sum(r.nll_sum for r in reports) / max(num_tokens, 1),
        accuracy=sum(r.num_correct for r in reports) / max(num_tokens, 1),
        grad_norm=reports[0].grad_norm,
        learning_rate=plan.learning_rate,
        num_tokens=num_tokens,
        num_padded=sum(r.num_padded for r in reports),
        num_positions=sum(r.num_positions for r in reports),
        grad_norm_clipped=reports[0].grad_norm_clipped,
        kl_nats=sum(kl_sums) / max(num_tokens, 1) if kl_sums else None,
        entropy=sum(entropies) / max(num_tokens, 1) if entropies else None,
        seconds={name: max(r.seconds.get(name, 0.0) for r in reports) for name in parts},
        figures={
            **begun,
            **sum((r.ratio for r in reports), DeltaSums()).figures("ratio"),
            **RankReport.routing(reports),
        },
    )


def summarise(rows: RankEvaluation, *, by_task: bool = True) -> EvalReport:
    """Means over tokens and problems, and the same for each task.

    A problem with several accepted answers has one row each. Its loss is that of the first, and it
    counts as right when greedy decoding writes any of them. Rows of problem -1 (text to be
    predicted, not a question) have a loss but no right or wrong.
    """
    # An ungraded row counts for itself; its negated position is an id nobody else has.
    problem_N = np.where(rows.problem_N >= 0, rows.problem_N, -1 - np.arange(len(rows.problem_N)))
    ids_P, first_P, problem_index_N = np.unique(problem_N, return_index=True, return_inverse=True)
    right_P = np.zeros(len(first_P), dtype=bool)
    np.logical_or.at(right_P, problem_index_N, rows.all_correct_N)
    graded_P = ids_P >= 0
    num_tokens = int(rows.num_tokens_N[first_P].sum())

    def per_token(sum_N: FloatArray | None) -> float | None:
        return None if sum_N is None else float(sum_N[first_P].sum()) / max(num_tokens, 1)

    names = sorted({t for t in rows.tasks if t}) if by_task else []
    return EvalReport(
        nll=float(rows.nll_N[first_P].sum()) / max(num_tokens, 1),
        token_accuracy=int(rows.num_correct_N[first_P].sum()) / max(num_tokens, 1),
        num_tokens=num_tokens,
        accuracy=float(right_P[graded_P].mean()) if graded_P.any() else None,
        entropy=per_token(rows.entropy_N),
        kl_nats=per_token(rows.kl_N),
        kl_reverse_nats=per_token(rows.kl_reverse_N),
        by_task={name: summarise(_rows_of(rows, name), by_task=False) for name in names},
    )


def _rows_of(rows: RankEvaluation, task: str) -> RankEvaluation:
    keep_N = np.array([t == task for t in rows.tasks])

    def kept(column_N: FloatArray | None) -> FloatArray | None:
        return None if column_N is None else column_N[keep_N]

    return RankEvaluation(
        nll_N=rows.nll_N[keep_N],
        num_correct_N=rows.num_correct_N[keep_N],
        num_tokens_N=rows.num_tokens_N[keep_N],
        all_correct_N=rows.all_correct_N[keep_N],
        problem_N=rows.problem_N[keep_N],
        tasks=tuple(t for t in rows.tasks if t == task),
        entropy_N=kept(rows.entropy_N),
        kl_N=kept(rows.kl_N),
        kl_reverse_N=kept(rows.kl_reverse_N),
    )
