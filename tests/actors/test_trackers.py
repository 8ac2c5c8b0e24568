"""Figures to trackers: each package itself, run without a server, and read back with its own reader."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
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


ATTEMPTS = [{1: 4.0, 2: 3.0}, {3: 2.0}]  # losses by step; the second attempt resumes from step 2
ODD = "retention.50% odd.nll"  # a task may be called anything


def two_attempts(job: JobConfig, results: Path) -> None:
    """Figures of a step come in two calls, as a step and its evaluation do. Nothing may go wrong."""
    for losses in ATTEMPTS:
        opened = trackers_of(job, results, "ftjob-1", installed=lambda package: False)
        opened.resume_from(min(losses) - 1)
        for step, loss in losses.items():
            figures: dict[str, float | str] = {"loss": loss, "gamma": float("nan"), "bound_by": "ess"}
            assert asyncio.run(opened.log(step, figures)) == []
            assert asyncio.run(opened.log(step, {ODD: 1.5})) == []
        assert opened.close() == []
        time.sleep(
            1.1
        )  # W&B names the directory of an offline run by the second: a job's attempts are further apart


def read_offline_runs(directory: Path) -> list[Any]:
    """All records of the files that `wandb sync` would send, oldest run first.

    The package writes them but has no reader for others. They are LevelDB logs: after seven bytes,
    blocks of 32 KiB with records of checksum (4 bytes), length (2), kind (1: whole, 2, 3, 4: its parts), data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(directory.rglob("run-*.wandb")):
        content, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            if kind == 0:  # the rest of a block too small for a header
                at = -(-(at + 1) // 32768) * 32768
                continue
            parts += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record = Record()
                record.ParseFromString(parts)
                records.append(record)
                parts = b""
    return records


def _until_written(directory: Path, steps: int) -> list[Any]:
    """W&B's own process writes the files, and may still be at it when the run is finished."""
    deadline = time.monotonic() + 30
    while True:
        records = read_offline_runs(directory)
        if sum(record.HasField("history") for record in records) >= steps or time.monotonic() > deadline:
            return records
        time.sleep(0.2)


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself, without a server: one run by the job's id, read back from its own files."""
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    two_attempts(config(type="wandb", wandb={"project": "mine", "tags": ["a"]}), tmp_path)

    records = _until_written(tmp_path, steps=3)
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {("ftjob-1", "mine", "ftjob-1")}
    assert {tuple(run.tags) for run in runs} == {("a",)}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["model"] == "m"
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss"], row[ODD]) for row in rows] == [
        (1, 4.0, 1.5),
        (2, 3.0, 1.5),
        (3, 2.0, 1.5),
    ]
    assert not any({"gamma", "bound_by"} & row.keys() for row in rows)


def test_mlflow_in_a_database_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself: the second attempt finds the job's run again and goes on with it."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    two_attempts(config(type="mlflow", mlflow={"experiment_name": "mine"}), tmp_path)

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("ftjob-1", "FINISHED")
    assert (run.data.tags["modeseek_job"], run.data.tags["model"]) == ("ftjob-1", "m")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert run.data.metrics["retention.50_ odd.nll"] == 1.5
    assert "gamma" not in run.data.metrics


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
