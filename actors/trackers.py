"""Metrics to TensorBoard, Weights & Biases and MLflow, where these are installed.

None of them is needed and none may harm a job: one that fails is dropped with a warning. They are
imported when the first figures arrive, by name, so that nothing here depends on them. TensorBoard's
own writer needs neither torch nor TensorFlow.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from modeseek_ray.config import JobConfig
from modeseek_ray.jobs.integrations import is_installed, options_of

Load = Callable[[str], Any]  # a module by its name


class Tracker(Protocol):
    """Takes the figures of a step, which may come in several calls. Both calls may block."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


Opener = Callable[[int], Tracker]  # from the step the attempt resumes from; 0 = the beginning


class Trackers:
    """All trackers of a job: opened with the first figures, closed with the journal."""

    def __init__(self, openers: Mapping[str, Opener]) -> None:
        self._openers = dict(openers)
        self._open: dict[str, Tracker] = {}
        self._resumed_step = 0

    def resume_from(self, step: int) -> None:
        """Call before the first figures."""
        self._resumed_step = step

    async def log(self, step: int, figures: Mapping[str, float | str]) -> list[str]:
        """Hand on the numbers, in a thread. Returns what went wrong, a sentence for each tracker dropped."""
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if not isinstance(value, str) and math.isfinite(value)
        }
        return await asyncio.to_thread(self._log, step, numbers)

    def _log(self, step: int, numbers: Mapping[str, float]) -> list[str]:
        problems = []
        for name, opener in list(self._openers.items()):
            try:
                if name not in self._open:
                    self._open[name] = opener(self._resumed_step)
                self._open[name].log(step, numbers)
            except Exception as error:  # whatever another package raises
                problems.append(f"{name} takes no more figures from this attempt: {error!r}.")
                del self._openers[name]
                self._open.pop(name, None)
        return problems

    def close(self) -> list[str]:
        """Finish what is open. Returns what went wrong."""
        problems = []
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                problems.append(f"{name} could not be closed: {error!r}.")
        self._open.clear()
        self._openers.clear()
        return problems


def trackers_of(
    config: JobConfig,
    results: Path,
    job_id: str,
    *,
    load: Load = import_module,
    installed: Callable[[str], bool] = is_installed,
) -> Trackers:
    """TensorBoard files in `results/tensorboard` where that is installed, and the job's integrations."""
    openers: dict[str, Opener] = {}
    if installed("tensorboard"):
        openers["tensorboard"] = partial(TensorBoard, results / "tensorboard", load)
    for integration in config.integrations or []:
        kind = WeightsAndBiases if integration.type == "wandb" else MlFlow
        openers[integration.type] = partial(kind, job_id, config, options_of(integration), load)
    return Trackers(openers)


class TensorBoard:
    """Event files, one for each attempt; a later one takes back the steps it does again."""

    def __init__(self, directory: Path, load: Load, resumed_step: int) -> None:
        events = load("tensorboard.compat.proto.event_pb2")
        self._event, self._summary = events.Event, load("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = load("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(directory))
        first = resumed_step + 1 if resumed_step else 0  # step 0 is the evaluation before training
        start = events.SessionLog(status=events.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first, session_log=start))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """On disk when it returns: an attempt may end at any time."""
        values = [
            self._summary.Value(tag=name.replace(".", "/", 1), simple_value=value)
            for name, value in figures.items()
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run for each job, by its id; a later attempt goes on with it."""

    def __init__(
        self, job_id: str, config: JobConfig, options: Mapping[str, Any], load: Load, resumed_step: int
    ) -> None:
        self._run = load("wandb").init(
            **{"project": "modeseek-ray", "name": config.suffix or job_id, **options},
            id=job_id,
            resume="allow",
            config=config.model_dump(mode="json", exclude_unset=True),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MlFlow:
    """One run for each job, found again by a tag with the job's id."""

    TAG = "modeseek_job"
    FORBIDDEN = re.compile(r"[^\w.\-/: ]")  # in names of metrics, and some are tasks the user named

    def __init__(
        self, job_id: str, config: JobConfig, options: Mapping[str, Any], load: Load, resumed_step: int
    ) -> None:
        module = load("mlflow")
        self._metric = load("mlflow.entities").Metric
        self._client = module.MlflowClient()
        name = options.get("experiment_name", "modeseek-ray")
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        runs = self._client.search_runs([experiment], filter_string=f"tags.{self.TAG} = '{job_id}'")
        run = runs[0] if runs else self._create(experiment, job_id, config, options)
        self._run_id = run.info.run_id

    def _create(self, experiment: str, job_id: str, config: JobConfig, options: Mapping[str, Any]) -> Any:
        run_name = options.get("run_name", config.suffix or job_id)
        return self._client.create_run(
            experiment, run_name=run_name, tags={self.TAG: job_id, "model": config.model}
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        metrics = [
            self._metric(self.FORBIDDEN.sub("_", name)[:250], value, now_ms, step)
            for name, value in figures.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
