"""Numbers by row: as the dictionary they replace, at the price of the rows put."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeseek_ray.errors import NumericsError, StorageError
from modeseek_ray.types import Evidence
from modeseek_ray.weights import Weighting, weigh
from modeseek_ray.weights.row_values import LARGEST_ROW, RowValues

ROWS = np.arange(40)
PUTS = st.lists(st.dictionaries(st.integers(0, 39), st.floats(-9, 9), min_size=1), max_size=6)


def put(values: RowValues, entries: dict[int, float]) -> RowValues:
    return values.put(np.array(list(entries), np.int64), np.array(list(entries.values())))


@given(puts=PUTS, asked=st.lists(st.integers(0, 6), max_size=6))
def test_every_version_answers_as_its_own_dictionary(puts: list[dict[int, float]], asked: list[int]) -> None:
    """Versions are asked in any order, later ones before and after those they came of."""
    versions, expected = [RowValues()], [dict[int, float]()]
    for entries in puts:
        versions.append(put(versions[-1], entries))
        expected.append({**expected[-1], **entries})
    for i in [*(i for i in asked if i < len(versions)), *range(len(versions))]:
        np.testing.assert_array_equal(versions[i].at(ROWS), [expected[i].get(r, np.nan) for r in ROWS])
        assert sorted(versions[i].known) == sorted(expected[i].values())


def test_two_versions_may_come_of_one() -> None:
    first = put(RowValues(), {1: 1.0})
    left, right = put(first, {1: 2.0}), put(first, {5: 3.0})
    assert [v.at(np.array([1, 5])).tolist()[0] for v in (first, left, right)] == [1.0, 2.0, 1.0]
    assert np.isnan(left.at(np.array([5]))).all()


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda v: RowValues.of(json.loads(json.dumps(v))),
        lambda v: pickle.loads(pickle.dumps(v)),
    ],
)
def test_what_is_stored_is_the_same_to_the_bit(again: Any) -> None:
    values = put(RowValues(), {0: 0.1, 7: 1 / 3})
    restored = again(values)
    later = put(values, {0: 5.0})
    assert restored == RowValues.of({"0": 0.1, "7": 1 / 3}) != later  # the dictionary of older checkpoints
    assert json.loads(json.dumps({"ledger": later}, indent=1, sort_keys=True))["ledger"] == later


def test_what_cannot_be_read_or_numbered_is_refused() -> None:
    with pytest.raises(StorageError, match="older checkpoint"):
        RowValues.of({"float64": "AAA"})
    for row in (-1, LARGEST_ROW):
        with pytest.raises(NumericsError, match=f"row {row} "):
            RowValues().put(np.array([3, row]), np.ones(2))


def batch(row_N: np.ndarray, log_N: np.ndarray) -> Evidence:
    return Evidence(None, log_N, np.ones(len(row_N)), row_N=row_N)


STATIC = Weighting.model_validate({"likelihood": {"scheme": "ratio_power", "of": "initial", "gamma": 1.0}})


def test_starved_rows_are_counted_as_they_come_and_go() -> None:
    """f = p: against 1, e^-9 starves; row 1 is saved by its second visit, row 2 is not."""
    first = weigh(batch(np.arange(3), np.array([0.0, -9.0, -9.0])), STATIC)
    assert first.metrics["starved_share"] == pytest.approx(2 / 3)
    second = weigh(batch(np.array([1, 3]), np.zeros(2)), STATIC, state=first.state)
    assert second.metrics["starved_share"] == pytest.approx(1 / 4)
    old = {"ledger": {str(row): value for row, value in enumerate(first.values_N.tolist())}}
    for state in (
        json.loads(json.dumps(first.state)),
        old,
    ):  # resumed: from today's checkpoint, and from an older
        resumed = weigh(batch(np.array([1, 3]), np.zeros(2)), STATIC, state=state)
        assert resumed.metrics == second.metrics and resumed.state == second.state


def test_rows_that_no_array_can_be_numbered_by_count_within_their_batch() -> None:
    weights = weigh(batch(np.array([-5, LARGEST_ROW]), np.array([0.0, -9.0])), STATIC)
    assert weights.metrics["starved_share"] == 0.5 and "ledger" not in weights.state
