"""What a job came to, from its result directory: the numbers behind the report and the demo's table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeseek_ray.reports.results import JobRecord, Metrics, read_job, read_metrics
from modeseek_ray.retention import TaskChange, forgetting
from modeseek_ray.retention.forgetting import Measure


@dataclass(frozen=True)
class JobSummary:
    """One job in a few numbers. None where the job did not measure it."""

    record: JobRecord
    metrics: Metrics
    new_task: TaskChange | None  # accuracy on the validation file, else its loss
    old_tasks: tuple[TaskChange, ...]  # each task of the retention file
    retention: TaskChange | None  # the whole retention file
    forgetting: dict[str, float]  # best past accuracy - now, by old task
    kl_nats: float | None  # forward KL(pi_0 || pi) per token on the retention file, at the end
    ess_ratio: float | None  # median over the steps
    gamma: float | None  # median over the steps
    num_steps: int
    num_tokens: int
    seconds: float | None

    @property
    def name(self) -> str:
        return self.record.name or self.record.id


def summarize(directory: Path) -> JobSummary:
    """Read a result directory, finished or not. Raises `StorageError` if it is not a job's."""
    record, metrics = read_job(directory), read_metrics(directory)
    tasks = metrics.tasks("retention")
    changes = [_change(metrics, f"retention.{task}", task, never_solved="nll") for task in tasks]
    started, finished = record.started_at, record.finished_at
    return JobSummary(
        record=record,
        metrics=metrics,
        new_task=_change(metrics, "validation", "new task"),
        old_tasks=tuple(change for change in changes if change is not None),
        retention=_change(metrics, "retention", "old tasks"),
        forgetting=forgetting({task: metrics.known(f"retention.{task}.accuracy")[1] for task in tasks}),
        kl_nats=metrics.last("retention.kl_nats"),
        ess_ratio=_median(metrics, "ess_ratio"),
        gamma=_median(metrics, "gamma"),
        num_steps=int(metrics.step_S.max(initial=0)),
        num_tokens=int(metrics.known("num_tokens")[1].sum()),
        seconds=None if started is None or finished is None else finished - started,
    )


def _change(
    metrics: Metrics, name: str, label: str, *, never_solved: Measure = "accuracy"
) -> TaskChange | None:
    """By accuracy, else by loss. `never_solved` is the measure for accuracies that are all zero.

    An old task that was never solved cannot be forgotten by that measure, but its loss still tells.
    """
    solved = bool(metrics.known(f"{name}.accuracy")[1].any())
    measures: tuple[Measure, ...] = ("accuracy", "nll")
    for measure in measures if solved or never_solved == "accuracy" else reversed(measures):
        before, after = metrics.first(f"{name}.{measure}"), metrics.last(f"{name}.{measure}")
        if before is not None and after is not None:
            return TaskChange(label, before, after, measure)
    return None


def _median(metrics: Metrics, name: str) -> float | None:
    values = metrics.known(name)[1]
    return float(np.median(values)) if len(values) else None
