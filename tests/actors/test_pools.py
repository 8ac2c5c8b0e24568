"""A batch over ranks that only remember: who is handed what, what is answered, whose failure counts."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from actors import workers
from actors.dealing import split
from actors.messages import RankBeginning, RankReport, RouteCounts
from actors.pools import TrainerPool
from modeseek_ray.data.batching import deal
from modeseek_ray.errors import WorkerError
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.types import Group, Handle, StepPlan


class EchoRank:
    """Scores sample (block, index) as the number stored in the block, so order mistakes show."""

    def __init__(self) -> None:
        self.plans: list[tuple[list[tuple[int, int]], StepPlan]] = []
        self.begun: list[float] = []  # what begin was called with
        self.stepped: list[float] = []

    async def call(self, method: str, *args: Any) -> Any:
        if method == "score":
            picks, *blocks = args
            return np.array([blocks[b][i] for b, i in picks])
        if method == "begin":
            picks, *blocks = args
            return self._begin([blocks[b][i] for b, i in picks])
        assert method == "step"
        picks, plan, *blocks = args
        self.plans.append((picks, plan))
        self.stepped += [blocks[b][i] for b, i in picks]
        n = len(picks)
        return RankReport(
            loss=float(plan.values_N.sum()), nll_sum=2.0 * n, num_correct=n, num_tokens=4 * n,
            num_positions=10 * n, num_padded=n, grad_norm=3.0, seconds={"forward": float(n)},
        )  # fmt: skip

    def _begin(self, values: list[float]) -> RankBeginning:
        """Odd samples do not know their sampler."""
        self.begun = values
        known_N = np.array([0.5 if v % 2 == 0 else np.nan for v in values])
        return RankBeginning(
            log_policy_N=np.array(values),
            sum_delta_N=known_N if (known_N == 0.5).any() else None,
            mismatch=DeltaSums(num_tokens=len(values), num_samples=len(values), abs_delta=sum(values)),
            routes=RouteCounts(8, 1, 4, 1, 7.5) if values else None,
        )

    async def stop(self) -> None:
        """Nothing to stop."""


class BrokenRank(EchoRank):
    async def call(self, method: str, *args: Any) -> Any:
        raise WorkerError("rank 1 died.", mend="Resume.")


def _groups() -> list[Group]:
    """Three groups of 2, 1 and 3 samples; two of them share a block."""
    first, second = [10.0, 11.0, 12.0], [20.0, 21.0, 22.0, 23.0]
    rows = [(0, first, [2, 0]), (1, second, [3]), (2, second, [0, 1, 2])]
    return [
        Group(
            prompt=p,
            row_N=np.array(index) + 100 * p,
            num_tokens_N=np.full(len(index), 4),
            length_N=np.array(index) * 7 + 5,
            payload=Handle(block, np.array(index)),
        )
        for p, block, index in rows
    ]


EXPECTED_N = [12.0, 10.0, 23.0, 20.0, 21.0, 22.0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
async def test_scores_come_back_in_the_order_of_the_groups(num_ranks: int) -> None:
    pool = TrainerPool([EchoRank() for _ in range(num_ranks)], deal)
    scored = await pool.score(_groups())
    assert [len(g) for g in scored] == [2, 1, 3]
    assert np.concatenate([g.log_policy_N for g in scored]).tolist() == EXPECTED_N


async def test_each_rank_gets_its_own_weights_and_figures_are_global() -> None:
    ranks = [EchoRank(), EchoRank()]
    groups = _groups()
    values_N = np.arange(6.0)
    report = await TrainerPool(ranks, deal).step(
        groups, StepPlan(0, values_N, denominator=24.0, learning_rate=0.1)
    )
    weight_of = dict(zip(EXPECTED_N, values_N, strict=True))
    blocks = split(groups, 2, deal)[1]
    for rank in ranks:
        ((picks, plan),) = rank.plans
        assert plan.values_N.tolist() == [weight_of[blocks[b][i]] for b, i in picks]
        assert plan.denominator == 24.0
    assert report.loss == values_N.sum()
    assert (report.num_tokens, report.nll, report.accuracy) == (24, 0.5, 0.25)
    assert report.seconds == {"forward": float(max(len(r.plans[0][0]) for r in ranks))}


async def test_ranks_that_share_samples_are_handed_the_same_and_count_once() -> None:
    ranks = [EchoRank() for _ in range(4)]
    pool = TrainerPool(ranks, deal, ranks_per_group=2)
    scored = await pool.score(_groups())
    assert np.concatenate([g.log_policy_N for g in scored]).tolist() == EXPECTED_N
    values_N = np.arange(6.0)
    report = await pool.step(_groups(), StepPlan(0, values_N, denominator=24.0, learning_rate=0.1))
    for first, second in (ranks[:2], ranks[2:]):
        ((picks, plan),), ((same_picks, same_plan),) = first.plans, second.plans
        assert picks == same_picks and plan.values_N.tolist() == same_plan.values_N.tolist()
    assert ranks[0].plans[0][0] != ranks[2].plans[0][0]
    assert (report.loss, report.num_tokens) == (values_N.sum(), 24)
    with pytest.raises(ValueError, match="3 ranks in groups of 2"):
        TrainerPool(ranks[:3], deal, ranks_per_group=2)


async def test_a_rank_that_dies_fails_the_call_at_once() -> None:
    with pytest.raises(WorkerError, match="rank 1 died"):
        await TrainerPool([EchoRank(), BrokenRank()], deal).score(_groups())


class Rank(EchoRank):
    """Answers with an error after a while, or never."""

    def __init__(self, error: WorkerError | None, after_s: float = 0.0) -> None:
        super().__init__()
        self._error = error
        self._after_s = after_s

    async def call(self, method: str, *args: Any) -> Any:
        await asyncio.sleep(self._after_s if self._error else 3600)
        raise self._error or AssertionError


async def test_a_rank_that_lost_its_neighbour_is_not_taken_for_the_cause() -> None:
    """Its broken connection is known before the death is; only a death is worth another attempt."""
    lost = Rank(WorkerError("rank 0 failed in step: RuntimeError('Connection closed by peer')"))
    dead = Rank(WorkerError("rank 1 died in step.", code="worker_died"), after_s=0.2)
    with pytest.raises(WorkerError, match="rank 1 died") as failed:
        await TrainerPool([lost, dead], deal).score(_groups())
    assert failed.value.code == "worker_died"


async def test_a_failure_of_its_own_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits in a collective for ever."""
    monkeypatch.setattr(workers, "DEATH_GRACE_S", 0.1)
    with pytest.raises(WorkerError, match="ValueError"):
        await TrainerPool([Rank(WorkerError("rank 0: ValueError")), Rank(None)], deal).score(_groups())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
async def test_steps_on_parts_stay_where_their_samples_were_begun(num_ranks: int) -> None:
    ranks = [EchoRank() for _ in range(num_ranks)]
    pool = TrainerPool(ranks, deal)
    groups = await pool.begin(_groups(), [np.array([0, 1, 5, 3]), np.array([2, 4])])
    assert np.concatenate([g.log_policy_N for g in groups]).tolist() == EXPECTED_N
    last = groups[2].take(np.array([2, 0]))
    for part in ([groups[0], last], [groups[1], groups[2].take(np.array([1]))]):
        count = sum(len(g) for g in part)
        report = await pool.step(part, StepPlan(0, np.ones(count), denominator=9.0, learning_rate=0.1))
        assert report.num_tokens == 4 * count
        # Of the whole batch, whatever the part: 108 = 12 + 10 + 23 + 20 + 21 + 22.
        assert report.figures["mismatch/mean_abs_delta"] == 108 / 6
        assert report.figures["routes/changed_token_layers"] == 1 / 8
        assert report.figures["routes/overlap"] == 7.5 / 8
    for rank in ranks:
        assert sorted(rank.stepped) == sorted(rank.begun)
        assert len(rank.plans) == 2, "every rank is in every step, with nothing to do if need be"


async def test_sum_delta_is_a_column_only_where_every_sampler_is_known() -> None:
    groups = _groups()
    groups[1] = groups[1].with_columns(is_replay_N=np.array([True]))
    even, replay, mixed = await TrainerPool([EchoRank(), EchoRank()], deal).begin(groups)
    assert even.sum_delta_N is not None and even.sum_delta_N.tolist() == [0.5, 0.5]
    assert replay.sum_delta_N is not None and replay.sum_delta_N.tolist() == [0.0], "23, and a replay row"
    assert mixed.sum_delta_N is None, "21 has no known sampler"


async def test_a_step_is_on_a_batch_that_was_begun_or_on_another_never_on_both() -> None:
    ranks = [EchoRank(), EchoRank()]
    pool = TrainerPool(ranks, deal)
    begun, other = await pool.begin(_groups()), _groups()
    with pytest.raises(ValueError, match="2 of a step's 8 samples were begun"):
        await pool.step([begun[0], *other], StepPlan(0, np.ones(8), denominator=9.0, learning_rate=0.1))
    report = await pool.step(other, StepPlan(0, np.ones(6), denominator=9.0, learning_rate=0.1))
    assert report.figures == {}, "figures of a batch that was not begun"


async def test_a_sample_that_is_drawn_twice_has_a_place_for_each() -> None:
    ranks = [EchoRank(), EchoRank()]
    pool = TrainerPool(ranks, deal)
    block = [7.0]
    group = Group(0, np.array([0, 0]), np.ones(2), np.ones(2), Handle(block, np.array([0, 0])))
    await pool.begin([group])
    await pool.step([group], StepPlan(0, np.ones(2), denominator=2.0, learning_rate=0.1))
    assert [rank.stepped for rank in ranks] == [[7.0], [7.0]]
