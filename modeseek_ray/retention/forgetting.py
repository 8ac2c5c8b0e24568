"""Forgetting of each old task: best past minus now (METHODS.md section 7).

Legend: E evaluations of one job, in order; NaN = not measured at that evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from modeseek_ray.types import EvalReport, FloatArray


def forgetting_path(values_E: Sequence[float] | FloatArray, *, higher_is_better: bool = True) -> FloatArray:
    """Best value so far minus the value, at every evaluation; never negative, 0 at the first.

    For losses (`higher_is_better=False`) the best is the lowest and the sign turns, so that larger
    always means more forgotten. Chaudhry et al. 2018 (1801.10112), equation 3, with the present
    evaluation among those the best is taken over.

    >>> forgetting_path([0.9, 1.0, 0.25]).tolist()
    [0.0, 0.0, 0.75]
    """
    signed_E = np.asarray(values_E, dtype=np.float64) * (1.0 if higher_is_better else -1.0)
    return np.fmax.accumulate(signed_E) - signed_E + 0.0


def forgetting(
    history: Mapping[str, Sequence[float] | FloatArray], *, higher_is_better: bool = True
) -> dict[str, float]:
    """Best past minus now for each task; tasks that were never measured are left out.

    >>> forgetting({"sort": [0.875, 1.0, 0.5], "facts": [0.5, 0.75]})
    {'sort': 0.5, 'facts': 0.0}
    """
    out = {}
    for task, values_E in history.items():
        path_E = forgetting_path(values_E, higher_is_better=higher_is_better)
        known_E = path_E[np.isfinite(path_E)]
        if len(known_E):
            out[task] = float(known_E[-1])
    return out


Measure = Literal["accuracy", "nll"]


@dataclass(frozen=True)
class TaskChange:
    """One old task before and after the job; shares of problems solved, or losses in nats."""

    task: str  # "" = the whole file
    before: float
    after: float
    measure: Measure = "accuracy"

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def kept(self) -> float | None:
        """after / before: the share of what was held that is still held. None if nothing was held."""
        return self.after / self.before if self.before > 0 else None


def retention_table(before: EvalReport, after: EvalReport) -> list[TaskChange]:
    """The whole file first, then its tasks in order: accuracy where there is one, else loss.

    A task is compared by the measure both reports have; one without any is left out.
    """
    pairs = [("", before, after)]
    shared = [task for task in before.by_task if task in after.by_task]
    pairs += [(task, before.by_task[task], after.by_task[task]) for task in shared]
    table = []
    for task, old, new in pairs:
        if old.accuracy is not None and new.accuracy is not None:
            table.append(TaskChange(task, old.accuracy, new.accuracy, "accuracy"))
        else:
            table.append(TaskChange(task, old.nll, new.nll, "nll"))
    return table
