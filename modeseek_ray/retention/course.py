"""What each old task has lost so far, at every evaluation of a running job."""

from __future__ import annotations

from collections.abc import Mapping

from modeseek_ray.types import FloatArray

FILE = "retention"
SIGNS = {"accuracy": 1.0, "nll": -1.0}  # whether larger is better


class RetentionCourse:
    """First and best figure of the retention file and of each of its tasks.

    By accuracy where the file is graded, in shares; by loss elsewhere, in nats. `forgetting` is how far
    the present figure lies behind the best so far, never negative; `change` is the figure minus the first.

    >>> course = RetentionCourse()
    >>> course.add({"retention.sort.accuracy": 0.75, "retention.sort.nll": 0.5})
    {'retention.sort.change': 0.0, 'retention.sort.forgetting': 0.0}
    >>> course.add({"retention.sort.accuracy": 0.25, "retention.sort.nll": 0.5})
    {'retention.sort.change': -0.5, 'retention.sort.forgetting': 0.5}
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}

    @classmethod
    def of(cls, columns: Mapping[str, FloatArray]) -> RetentionCourse:
        """Continue after the evaluations in these columns of `metrics.csv`, NaN where there was none."""
        course = cls()
        size = max((len(column) for column in columns.values()), default=0)
        for i in range(size):
            row = {name: float(column[i]) for name, column in columns.items()}
            course.add({name: value for name, value in row.items() if value == value})
        return course

    def add(self, figures: Mapping[str, float | str]) -> dict[str, float]:
        """What one evaluation says, in the names of `results.flatten`; returns the figures to add to it."""
        added: dict[str, float] = {}
        for name, value in figures.items():
            task, _, measure = name.rpartition(".")
            if isinstance(value, str) or measure not in SIGNS or f"{task}.".partition(".")[0] != FILE:
                continue
            if measure == "nll" and f"{task}.accuracy" in figures:
                continue
            sign = SIGNS[measure]
            first = self._first.setdefault(name, value)
            best = self._best[name] = sign * max(sign * self._best.get(name, value), sign * value)
            added[f"{task}.change"] = value - first
            added[f"{task}.forgetting"] = sign * (best - value) + 0.0
        return added
