"""The ledger boiled down, on numbers a person can work out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modeseek_ray.reports.distribution import BIN_EDGES, distribution
from modeseek_ray.reports.ledger import SCHEMA


def table(*records: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{"num_tokens": 4, "is_replay": False, **r} for r in records], schema=SCHEMA)


def sample(step: int, row: int, weight: float, **columns: Any) -> dict[str, Any]:
    return {"step": step, "row": row, "weight": weight, **columns}


def test_rows_add_up_over_pieces() -> None:
    _, ledger = distribution(
        [
            table(sample(1, 7, 0.5), sample(1, 2, 1.5), sample(2, 7, 1.0)),
            table(sample(3, 7, 3.0), sample(3, 2, 0.25)),
        ]
    )
    assert ledger.row_R.tolist() == [2, 7]
    assert ledger.uses_R.tolist() == [2, 3]
    assert ledger.cumulative_R.tolist() == [1.75, 4.5]
    assert ledger.first_R.tolist() == [1.5, 0.5]
    assert ledger.last_R.tolist() == [0.25, 3.0]
    assert ledger.mean_R.tolist() == [0.875, 1.5]


def test_first_and_last_use_within_one_piece() -> None:
    _, ledger = distribution([table(sample(1, 4, 0.5), sample(2, 4, 2.0), sample(3, 4, 1.0))])
    assert (ledger.first_R.tolist(), ledger.last_R.tolist()) == ([0.5], [1.0])


def test_log_ratio_is_per_token_and_unknown_where_not_measured() -> None:
    _, ledger = distribution(
        [table(sample(1, 0, 1.0, log_policy=-4.0, log_reference=-6.0), sample(1, 1, 1.0, log_policy=-4.0))]
    )
    assert ledger.log_ratio_R[0] == 0.5  # (-4 + 6) / 4 tokens
    assert np.isnan(ledger.log_ratio_R[1])


def test_replay_rows_are_another_files_rows() -> None:
    course, ledger = distribution([table(sample(1, 0, 2.0), sample(1, 0, 9.0, is_replay=True))])
    assert ledger.cumulative_R.tolist() == [2.0]
    assert course.quantiles_SQ[0].tolist() == [2.0] * 5


def test_starved_and_dominant_rows() -> None:
    """Twenty rows: one of .05, one of 15, the others 1: the average is 1.6525, five times it 8.26."""
    weights = [0.05, 15.0] + [1.0] * 18
    _, ledger = distribution([table(*(sample(1, row, w) for row, w in enumerate(weights)))])
    assert ledger.row_R[ledger.starved_R].tolist() == [0]
    assert ledger.row_R[ledger.dominant_R].tolist() == [1]
    assert ledger.row_R[ledger.most(2)].tolist() == [1, 2]
    assert ledger.row_R[ledger.least(2)].tolist() == [0, 2]


def test_quantiles_and_histogram_by_step() -> None:
    course, _ = distribution([table(*(sample(5, row, w) for row, w in enumerate([0.0, 0.5, 1.0, 1.5, 2.0])))])
    assert course.step_S.tolist() == [5]
    assert course.quantiles_SQ[0] == pytest.approx([0.1, 0.5, 1.0, 1.5, 1.9])
    counts = dict(zip(BIN_EDGES[:-1].round(6).tolist(), course.counts_SB[0].tolist(), strict=True))
    assert counts[-7.0] == 1  # weight 0 falls into the lowest bin
    assert counts[0.0] == 1  # weight 1
    assert sum(counts.values()) == 5


def test_no_ledger_yet() -> None:
    course, ledger = distribution([])
    assert len(course.step_S) == 0
    assert len(ledger) == 0
    assert ledger.starved_R.tolist() == ledger.dominant_R.tolist() == []
