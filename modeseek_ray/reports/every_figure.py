"""The last table of a report: every figure the job logged, so that none is in the files alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from modeseek_ray.reports.results import Metrics


@dataclass(frozen=True)
class FigureRow:
    """One column of `metrics.csv` over the job. `steps` is how many rows of the file have it."""

    name: str
    first: float
    last: float
    least: float
    most: float
    steps: int


def every_figure(metrics: Metrics) -> list[FigureRow]:
    """All columns of numbers that hold any, by name.

    >>> [row.last for row in every_figure(Metrics.of([{"step": 1, "nll": 2.0}, {"step": 2, "nll": 1.5}]))]
    [1.5]
    """
    rows = []
    for name in sorted(metrics.columns):
        values_S = metrics.known(name)[1]
        if len(values_S):
            low, high = float(np.min(values_S)), float(np.max(values_S))
            rows.append(FigureRow(name, float(values_S[0]), float(values_S[-1]), low, high, len(values_S)))
    return rows


def every_text(metrics: Metrics) -> dict[str, str]:
    """Columns of words: how many steps had which, the commonest first. `{"bound_by": "ess 90, warmup 10"}`"""
    counts = {name: Counter(word for word in words if word) for name, words in metrics.texts.items()}
    return {
        name: ", ".join(f"{word} {steps}" for word, steps in counter.most_common())
        for name, counter in counts.items()
        if counter
    }
