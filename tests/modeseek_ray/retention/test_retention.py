"""Forgetting and Pareto points, on numbers a person can work out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeseek_ray.retention import (
    RetentionCourse,
    TaskChange,
    forgetting,
    forgetting_path,
    pareto_front,
    retention_at_success,
    retention_table,
)
from modeseek_ray.types import EvalReport


def report(accuracy: float | None, nll: float = 1.0, **tasks: EvalReport) -> EvalReport:
    return EvalReport(nll=nll, token_accuracy=0.5, num_tokens=10, accuracy=accuracy, by_task=tasks)


def test_forgetting_is_best_past_minus_now() -> None:
    assert forgetting_path([0.5, 0.75, 0.25, 1.0]).tolist() == [0.0, 0.0, 0.5, 0.0]


def test_for_a_loss_the_best_is_the_lowest() -> None:
    assert forgetting_path([2.0, 1.0, 1.5], higher_is_better=False).tolist() == [0.0, 0.0, 0.5]


def test_unmeasured_evaluations_neither_reset_the_best_nor_count_as_now() -> None:
    assert forgetting({"sort": [1.0, np.nan, 0.25, np.nan]}) == {"sort": 0.75}
    assert forgetting({"sort": [np.nan]}) == {}


def test_retention_table_takes_accuracy_and_falls_back_to_loss() -> None:
    before = report(0.95, sort=report(1.0), prose=report(None, nll=2.0), gone=report(1.0))
    after = report(0.7, sort=report(0.5), prose=report(None, nll=2.5))
    table = retention_table(before, after)
    assert table == [
        TaskChange("", 0.95, 0.7),
        TaskChange("sort", 1.0, 0.5),
        TaskChange("prose", 2.0, 2.5, "nll"),
    ]
    assert table[1].change == -0.5
    assert table[1].kept == 0.5
    assert TaskChange("x", 0.0, 0.5).kept is None


def test_pareto_front_keeps_ties_and_drops_what_is_beaten() -> None:
    #      beaten by the second on both axes, or on one with the other equal
    success = [0.8, 0.9, 0.9, 0.9, 0.2, np.nan]
    retention = [0.5, 0.6, 0.6, 0.4, 1.0, 1.0]
    assert pareto_front(success, retention).tolist() == [False, True, True, False, True, False]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_every_point_off_the_front_is_beaten_by_one_on_it(points: list[tuple[int, int]]) -> None:
    success, retention = zip(*points, strict=True)
    front = pareto_front(success, retention)
    assert front.any()
    for on_front, (x, y) in zip(front, points, strict=True):
        beaten = any(
            u >= x and v >= y and (u, v) != (x, y) for (u, v), kept in zip(points, front, strict=True) if kept
        )
        assert bool(on_front) != beaten


def test_retention_at_success_interpolates_the_first_crossing() -> None:
    # .8 → 1.0 crosses .9 half way: retention half way between .9 and .5
    assert retention_at_success([0.0, 0.8, 1.0, 0.5, 1.0], [1.0, 0.9, 0.5, 1.0, 1.0]) == pytest.approx(0.7)
    assert retention_at_success([0.95, 1.0], [0.8, 0.1]) == 0.8
    assert retention_at_success([0.0, 0.5], [1.0, 1.0]) is None
    assert retention_at_success([0.0, np.nan, 1.0], [1.0, 0.0, 0.0], target=0.5) == 0.5


def test_the_course_of_a_running_job_follows_accuracy_else_loss() -> None:
    course = RetentionCourse()
    course.add({"retention.accuracy": 0.5, "retention.nll": 2.0, "retention.odd.nll": 1.0, "loss": 9.0})
    course.add({"retention.accuracy": 0.75, "retention.nll": 9.0, "retention.odd.nll": 0.5})
    assert course.add({"retention.accuracy": 0.25, "retention.odd.nll": 0.75, "validation.nll": 0.0}) == {
        "retention.change": -0.25,
        "retention.forgetting": 0.5,
        "retention.odd.change": -0.25,
        "retention.odd.forgetting": 0.25,
    }


def test_a_resumed_job_remembers_the_best_of_its_earlier_attempt() -> None:
    columns = {"retention.accuracy": np.array([0.5, np.nan, 1.0]), "loss": np.array([np.nan, 1.0, 1.0])}
    course = RetentionCourse.of(columns)
    assert course.add({"retention.accuracy": 0.75}) == {
        "retention.change": 0.25,
        "retention.forgetting": 0.25,
    }
