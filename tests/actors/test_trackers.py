"""Figures to trackers: TensorBoard's files read back with its own reader; the others by their calls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.journal import CallbackSink, ResultJournal
from actors.trackers import Tracker, Trackers, trackers_of
from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.types import EvalReport, Group, Handle, StepReport, Weights


def config(**integration: Any) -> JobConfig:
    job: dict[str, Any] = {"model": "m", "training_file": "f", "method": {"type": "supervised"}}
    return parse_config({**job, "integrations": [integration] if integration else None})


def report(step: int, loss: float) -> StepReport:
    return StepReport(
        step=step, loss=loss, nll=2.0, accuracy=0.5, grad_norm=1.0, learning_rate=0.1, num_tokens=4
    )


def group() -> Group:
    two = np.array([3, 3])
    return Group(0, np.array([0, 1]), two, two, Handle([], np.arange(2)))


WEIGHTS = Weights(np.ones(2), gamma=0.25, beta=None, ess_ratio=1.0, bound_by="fixed", metrics={"khat": 0.5})


def test_the_journal_writes_what_tensorboard_reads(tmp_path: Path) -> None:
    """Steps 1 to 3; then an attempt that resumes from 2 and does step 3 again: one value a step."""

    async def attempt(first: int, losses: list[float]) -> None:
        trackers = trackers_of(config(), tmp_path, "job")
        journal = ResultJournal(tmp_path, CallbackSink(lambda event: None), trackers=trackers)
        journal.resume_from(first - 1)
        if first == 1:
            await journal.evaluated(0, {"retention": EvalReport(nll=1.5, token_accuracy=0.5, num_tokens=9)})
        for step, loss in enumerate(losses, start=first):
            await journal.record(step, [group()], WEIGHTS, report(step, loss), 4)
        journal.close()

    asyncio.run(attempt(1, [4.0, 3.0, 9.0]))
    asyncio.run(attempt(3, [2.0, 1.0]))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert [(e.step, e.value) for e in read.Scalars("retention/nll")] == [(0, 1.5)]
    assert {"weights/khat", "gamma", "ess_ratio", "grad_norm"} <= set(read.Tags()["scalars"])
    assert "bound_by" not in read.Tags()["scalars"]


class Recorder:
    """Stands for a module, an object or a function of it: notes calls, returns what was given."""

    def __init__(self, **returns: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._returns = returns

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return self._returns.get(name)

        return call


def feed(trackers: Trackers) -> list[str]:
    figures: dict[str, float | str] = {"loss": 2.0, "gamma": float("nan"), "bound_by": "ess"}
    return asyncio.run(trackers.log(3, figures)) + trackers.close()


def test_weights_and_biases_gets_one_run_per_job(tmp_path: Path) -> None:
    run = Recorder()
    wandb = Recorder(init=run)
    job = config(type="wandb", wandb={"project": "mine", "tags": ["a"]})
    opened = trackers_of(
        job, tmp_path, "ftjob-1", load={"wandb": wandb}.__getitem__, installed=lambda _: False
    )
    assert feed(opened) == []
    ((_, _, options),) = wandb.calls
    assert (options["project"], options["tags"], options["name"]) == ("mine", ["a"], "ftjob-1")
    assert (options["id"], options["resume"], options["config"]["model"]) == ("ftjob-1", "allow", "m")
    assert run.calls == [("log", ({"loss": 2.0},), {"step": 3}), ("finish", (), {})]


@pytest.mark.parametrize("known", [False, True])
def test_mlflow_finds_the_jobs_run_again(tmp_path: Path, known: bool) -> None:
    run = SimpleNamespace(info=SimpleNamespace(run_id="run-7"))
    client = Recorder(
        get_experiment_by_name=SimpleNamespace(experiment_id="e") if known else None,
        create_experiment="e",
        search_runs=[run] if known else [],
        create_run=run,
    )
    modules = {
        "mlflow": SimpleNamespace(MlflowClient=lambda: client),
        "mlflow.entities": SimpleNamespace(Metric=lambda name, value, ms, step: (name, value, step)),
    }
    job = config(type="mlflow", mlflow={"experiment_name": "mine"})
    opened = trackers_of(job, tmp_path, "ftjob-1", load=modules.__getitem__, installed=lambda _: False)
    assert feed(opened) == []
    names = [name for name, _, _ in client.calls]
    assert ("create_run" in names) != known
    assert ("log_batch", ("run-7",), {"metrics": [("loss", 2.0, 3)]}) in client.calls
    assert names[-1] == "set_terminated"
    search = next(options for name, _, options in client.calls if name == "search_runs")
    assert search["filter_string"] == "tags.modeseek_job = 'ftjob-1'"


def test_a_tracker_that_fails_is_dropped_with_a_warning_and_the_job_goes_on(tmp_path: Path) -> None:
    seen: list[int] = []

    class Broken:
        def log(self, step: int, figures: Any) -> None:
            raise OSError("the host is away")

        def close(self) -> None:
            raise AssertionError("it was dropped")

    class Sound:
        def log(self, step: int, figures: Any) -> None:
            seen.append(step)

        def close(self) -> None:
            seen.append(-1)

    def broken(step: int) -> Tracker:
        return Broken()

    events: list[Any] = []
    trackers = Trackers({"broken": broken, "sound": lambda step: Sound()})
    journal = ResultJournal(tmp_path, CallbackSink(events.append), trackers=trackers)

    async def two_steps() -> None:
        for step in (1, 2):
            await journal.record(step, [group()], WEIGHTS, report(step, 1.0), 2)

    asyncio.run(two_steps())
    journal.close()
    assert seen == [1, 2, -1]
    warned = [event["message"] for event in events if event["level"] == "warn"]
    assert len(warned) == 1 and "the host is away" in warned[0]
