"""The job's memory: result files in the job's directory, and events to whoever follows.

Events go to a `Sink`: over HTTP to the service (`HttpSink`), or to a callable in this process
(`modeseek run`). The files are written first, so a lost connection loses no numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from actors.roles import Desired
from actors.trackers import Trackers
from modeseek_ray.reports.results import MetricsWriter, WeightsWriter, flatten, read_metrics
from modeseek_ray.retention import RetentionCourse
from modeseek_ray.types import EvalReport, Group, StepReport, Weights

PROGRESS_EVERY_S = 5.0
# What a driver can be at; each has a deadline, and a job that misses it gets a new attempt.
SECTIONS = ("setup", "score", "rollout", "step", "evaluate", "sync", "checkpoint", "export")

Level = Literal["info", "warn", "error"]


class Sink(Protocol):
    """Takes events in order. `emit` returns at once; delivery is the sink's business."""

    def emit(self, event: Mapping[str, Any]) -> None: ...

    def beat(self, status: Mapping[str, Any]) -> None:
        """What the next heartbeat should say."""
        ...

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None: ...

    async def forget(self, checkpoints: Sequence[Path]) -> None: ...

    async def running(self) -> None:
        """The first step is committed: the job is running in the user's eyes."""
        ...

    def desired(self) -> Desired: ...


class ResultJournal:
    """`roles.Journal`: metrics CSV, weights Parquet, events, and trackers if there are any."""

    def __init__(
        self,
        results: Path,
        sink: Sink,
        *,
        attempt: int = 1,
        trackers: Trackers | None = None,
        deadlines_s: Mapping[str, float] | None = None,
    ) -> None:
        """`deadlines_s`: what the operator wants instead of a section's own deadline, by its name."""
        self._results = results
        self._deadlines_s = deadlines_s or {}
        self._sink = sink
        self._trackers = trackers or Trackers({})
        self._attempt = attempt
        self._metrics = MetricsWriter(results)
        self._weights = WeightsWriter(results)
        self._retention = RetentionCourse()
        self._status: dict[str, Any] = {}
        self._steps_here = 0
        self._seconds_here = 0.0

    async def message(self, text: str, *, level: Level = "info", **data: Any) -> None:
        self._emit("message", text, data, level)

    async def section(self, name: str, *, deadline_s: float) -> None:
        self._status.update(section=name, deadline_s=self._deadlines_s.get(name, deadline_s))
        self._sink.beat(dict(self._status))

    async def record(
        self, step: int, groups: Sequence[Group], weights: Weights, report: StepReport, total_steps: int
    ) -> None:
        figures = flatten(report, weights)
        self._metrics.append(step, figures)
        self._weights.append(step, groups, weights)
        seconds = report.seconds.get("total", 0.0)
        self._steps_here += 1
        self._seconds_here += seconds
        progress = {
            "step": step,
            "total_steps": total_steps,
            "tokens_per_s": report.num_tokens / seconds if seconds else 0.0,
            "eta_s": (total_steps - step) * self._seconds_here / self._steps_here,
        }
        self._status.update(progress)
        self._sink.beat(dict(self._status))
        for warning in weights.warnings:
            await self.message(f"Step {step}: {warning}", level="warn", step=step)
        await self._track(step, figures)
        self._emit("metrics", f"Step {step}/{total_steps}: loss {report.loss:.4f}", {**progress, **figures})
        if self._steps_here == 1:
            await self._sink.running()

    async def skipped(self, step: int, figures: Mapping[str, float], total_steps: int) -> None:
        self._metrics.append(step, figures)
        await self._track(step, figures)
        progress = {"step": step, "total_steps": total_steps}
        self._status.update(progress)
        self._sink.beat(dict(self._status))
        text = f"Step {step}/{total_steps}: no sample to train on; the weights stay."
        self._emit("metrics", text, {**progress, **figures})
        if self._steps_here == 0:
            await self._sink.running()

    async def evaluated(
        self, step: int, reports: Mapping[str, EvalReport], figures: Mapping[str, float] | None = None
    ) -> None:
        found = flatten(None, None, reports)
        found |= self._retention.add(found)
        found |= figures or {}
        self._metrics.evaluated(step, found)
        await self._track(step, found)
        self._emit("metrics", f"Evaluated at step {step}.", {"step": step, **found})

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None:
        self._weights.flush()
        await self._sink.checkpoint(step, directory, metrics)
        self._emit("message", f"Checkpoint at step {step}.", {"step": step, **metrics}, "info")

    async def forget(self, checkpoints: Sequence[Path]) -> None:
        await self._sink.forget(checkpoints)

    async def desired(self) -> Desired:
        return self._sink.desired()

    def progress(self, text: str) -> Callable[[int, int], None]:
        """A callback (done, total) for long work, which says `text` now and then, not each time."""
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= PROGRESS_EVERY_S:
                last = time.monotonic()
                self._emit("message", text.format(done=done, total=total), {"done": done, "total": total})

        return tell

    def resume_from(self, step: int) -> None:
        """Forget what an earlier attempt recorded beyond the checkpoint that is loaded."""
        self._metrics.truncate_after(step)
        self._retention = RetentionCourse.of(read_metrics(self._results).columns)
        self._weights.truncate_after(step)
        self._trackers.resume_from(step)

    def close(self) -> list[Path]:
        """Finish the files and name them."""
        for problem in self._trackers.close():
            self._emit("message", problem, {}, "warn")
        return [self._metrics.close(), self._weights.close()]

    async def _track(self, step: int, figures: Mapping[str, float | str]) -> None:
        for problem in await self._trackers.log(step, figures):
            await self.message(problem, level="warn", step=step)

    def _emit(self, kind: str, text: str, data: Mapping[str, Any], level: Level = "info") -> None:
        self._sink.emit(
            {
                "type": kind,
                "level": level,
                "message": text,
                "created_at": time.time(),
                "data": {**data, "attempt": self._attempt},
            }
        )


class CallbackSink:
    """Events to a function of this process; nobody asks for a stop but Ctrl-C."""

    def __init__(self, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        self._on_event = on_event
        self._wanted: Desired = "run"

    def emit(self, event: Mapping[str, Any]) -> None:
        self._on_event(event)

    def beat(self, status: Mapping[str, Any]) -> None:
        """Progress is in the metrics events already."""

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None:
        """The rename has committed it: without a service the directory is the only record."""

    async def forget(self, checkpoints: Sequence[Path]) -> None:
        """Nobody lists them."""

    async def running(self) -> None:
        """Nobody keeps a state here."""

    def desired(self) -> Desired:
        return self._wanted

    def interrupt(self) -> None:
        self._wanted = "pause"
