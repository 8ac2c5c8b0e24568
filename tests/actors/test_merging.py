"""What ranks measured, put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.merging import summarise
from actors.messages import RankEvaluation


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
        "entropy_N": np.array([0.5, 9.0, 1.0, 0.5]),
    }
    return RankEvaluation(**{**columns, **changes})


def test_a_problem_counts_once_and_any_accepted_answer_is_right() -> None:
    report = summarise(_rows())
    assert report.accuracy == 0.5  # the text row has no right answer to write
    assert report.nll == (3.0 + 6.0 + 8.0) / 10
    assert report.kl_nats == pytest.approx(0.1)
    assert report.entropy == pytest.approx((0.5 + 1.0 + 0.5) / 10)
    assert report.kl_reverse_nats is None
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
        **{k: None if v is None else v[index_N] for k, v in vars(rows).items() if k != "tasks"},
        tasks=tuple(rows.tasks[i] for i in index_N),
    )
