"""Splitting a batch over workers and merging what they answer, with workers that only remember."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.messages import RankEvaluation, RankReport
from actors.pools import TrainerPool, split, summarise
from modeseek_ray.data.batching import deal
from modeseek_ray.errors import WorkerError
from modeseek_ray.types import Group, Handle, StepPlan


class EchoRank:
    """Scores sample (block, index) as the number stored in the block, so order mistakes show."""

    def __init__(self) -> None:
        self.plans: list[tuple[list[tuple[int, int]], StepPlan]] = []

    async def call(self, method: str, *args: Any) -> Any:
        if method == "score":
            picks, *blocks = args
            return np.array([blocks[b][i] for b, i in picks])
        assert method == "step"
        picks, plan, *_ = args
        self.plans.append((picks, plan))
        n = len(picks)
        return RankReport(
            loss=float(plan.values_N.sum()), nll_sum=2.0 * n, num_correct=n, num_tokens=4 * n,
            num_positions=10 * n, num_padded=n, grad_norm=3.0, seconds={"forward": float(n)},
        )  # fmt: skip

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


async def test_a_rank_that_dies_fails_the_call_at_once() -> None:
    with pytest.raises(WorkerError, match="rank 1 died"):
        await TrainerPool([EchoRank(), BrokenRank()], deal).score(_groups())


def _rows(**changes: Any) -> RankEvaluation:
    """Problem 0 has two accepted answers, the second of them written; problem 1 one, not written; a text row."""
    columns: dict[str, Any] = {
        "nll_N": np.array([3.0, 1.0, 6.0, 8.0]),
        "num_correct_N": np.array([1, 2, 0, 4]),
        "num_tokens_N": np.array([2, 2, 4, 4]),
        "all_correct_N": np.array([False, True, False, False]),
        "problem_N": np.array([0, 0, 1, -1]),
        "tasks": ("sort", "sort", "copy", "text"),
        "kl_N": np.array([0.2, 9.0, 0.4, 0.4]),
    }
    return RankEvaluation(**{**columns, **changes})


def test_a_problem_counts_once_and_any_accepted_answer_is_right() -> None:
    report = summarise(_rows())
    assert report.accuracy == 0.5  # the text row has no right answer to write
    assert report.nll == (3.0 + 6.0 + 8.0) / 10
    assert report.kl_nats == pytest.approx(0.1)
    assert report.by_task["sort"].accuracy == 1.0
    assert report.by_task["copy"].accuracy == 0.0
    assert report.by_task["text"].accuracy is None
    assert summarise(_rows(problem_N=np.full(4, -1))).accuracy is None


def test_rows_of_several_ranks_are_merged_in_order() -> None:
    whole = _rows()
    order_N = np.array([2, 0, 3, 1])
    parts = [_take(whole, order_N[:1]), _take(whole, order_N[1:])]
    merged = RankEvaluation.merge(parts, order_N)
    assert merged.nll_N.tolist() == whole.nll_N.tolist()
    assert merged.tasks == whole.tasks


def _take(rows: RankEvaluation, index_N: np.ndarray) -> RankEvaluation:
    return RankEvaluation(
        **{k: v[index_N] for k, v in vars(rows).items() if k != "tasks"},
        tasks=tuple(rows.tasks[i] for i in index_N),
    )
