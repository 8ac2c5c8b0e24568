"""The unmodified `openai` client against the real service, Ray, DeepSpeed and the playground's MoE model."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pyarrow.parquet as pq
import pytest
from openai.types.fine_tuning import FineTuningJob

from modeseek_ray.playground import data_files
from tests.conftest import head_of
from tests.e2e.secrecy import leaks, secrets_of

STEPS = 6
JOB_DEADLINE_S = 600


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=2)


@pytest.fixture(scope="module")
def files(
    client: openai.OpenAI, modeseek_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    paths, directory = data_files(modeseek_home), tmp_path_factory.mktemp("files")
    wanted = {
        "training": ("new-task.train", 128),
        "validation": ("new-task.valid", 16),
        "retention": ("old-tasks.retention", 24),
    }
    return {
        role: client.files.create(file=head_of(paths[name], rows, directory), purpose="fine-tune").id
        for role, (name, rows) in wanted.items()
    }


def _training(**changes: Any) -> dict[str, Any]:
    return {
        "epochs": 1,
        "batch_size": 16,
        "max_steps": STEPS,
        "checkpoint_every": 3,
        "evaluate_every": 3,
        **changes,
    }


def _create(
    client: openai.OpenAI, model: Path, files: dict[str, str], method: Any, **extra: Any
) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model=str(model),
        training_file=files["training"],
        validation_file=files["validation"],
        method=method,
        extra_body={"retention_file": files["retention"], **extra},
    )


def _wait(client: openai.OpenAI, job_id: str, *statuses: str) -> FineTuningJob:
    deadline = time.monotonic() + JOB_DEADLINE_S
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        assert job.status not in ("failed", "cancelled"), job.error
        time.sleep(0.5)
    raise AssertionError(f"{job_id} is still {job.status}")


def test_a_supervised_and_a_weighted_job_from_upload_to_results(
    client: openai.OpenAI, files: dict[str, str], playground_moe: Path
) -> None:
    supervised = _create(
        client, playground_moe, files, {"type": "supervised", "supervised": {"training": _training()}}
    )
    weighted = _create(
        client,
        playground_moe,
        files,
        {"type": "weighted", "weighted": {"preset": "anchored", "training": _training()}},
        resources={"trainers": 2, "zero_stage": 2},
    )
    assert supervised.status == "validating_files"
    for job in (supervised, weighted):
        done = _wait(client, job.id, "succeeded")
        assert done.fine_tuned_model is not None
        assert done.trained_tokens
        _check_events(client, job.id)
        _check_results(client, done)
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        assert {c.step_number for c in checkpoints} == {3, 6}
        assert done.fine_tuned_model in {m.id for m in client.models.list()}
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert set(listed) >= {supervised.id, weighted.id}


def _check_events(client: openai.OpenAI, job_id: str) -> None:
    """Paged, newest first, and every optimizer step exactly once."""
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=5))
    assert len({e.id for e in events}) == len(events)
    steps = [e.data["step"] for e in events if e.type == "metrics" and "loss" in e.data]  # type: ignore[index]
    assert steps == list(range(STEPS, 0, -1))


def _check_results(client: openai.OpenAI, job: FineTuningJob) -> None:
    by_name = {client.files.retrieve(i).filename: client.files.content(i).read() for i in job.result_files}
    rows = list(csv.DictReader(io.StringIO(by_name["metrics.csv"].decode())))
    assert [int(r["step"]) for r in rows] == list(range(STEPS + 1))
    assert float(rows[-1]["retention.kl_nats"]) > 0
    ledger = pq.read_table(io.BytesIO(by_name["weights.parquet"])).to_pydict()
    assert set(ledger["step"]) == set(range(1, STEPS + 1))
    assert b"<html" in by_name["report.html"]


def test_events_are_streamed_and_a_stream_resumes_without_a_gap(
    client: openai.OpenAI, files: dict[str, str], playground_moe: Path, service: Any
) -> None:
    import httpx

    job = _create(
        client, playground_moe, files, {"type": "supervised", "supervised": {"training": _training()}}
    )
    url = f"{service.url}/v1/fine_tuning/jobs/{job.id}/events"
    headers = {"Accept": "text/event-stream"}
    with httpx.stream("GET", url, headers=headers, timeout=JOB_DEADLINE_S) as stream:
        ids = [line.removeprefix("id: ") for line in stream.iter_lines() if line.startswith("id:")]
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    assert len(ids) == len(list(client.fine_tuning.jobs.list_events(job.id)))
    with httpx.stream("GET", url, headers={**headers, "Last-Event-ID": ids[4]}, timeout=60) as stream:
        rest = [line.removeprefix("id: ") for line in stream.iter_lines() if line.startswith("id:")]
    assert rest == ids[5:]


def test_cancel_stops_every_process_of_the_job(
    client: openai.OpenAI, files: dict[str, str], playground_moe: Path, service: Any
) -> None:
    training = _training(epochs=50, max_steps=100_000, evaluate_every=1000, checkpoint_every=1000)
    job = _create(client, playground_moe, files, {"type": "supervised", "supervised": {"training": training}})
    _wait_for_steps(client, job.id)
    assert _workers(service), "a running job has a driver and a trainer"
    assert len(secrets_of(service.home)) >= 3  # Ray's, the operator's, the attempt's
    assert leaks(service.home, service.family(), list(client.fine_tuning.jobs.list_events(job.id))) == []
    client.fine_tuning.jobs.cancel(job.id)
    started = time.monotonic()
    while _workers(service) and time.monotonic() - started < 60:
        time.sleep(0.2)
    assert time.monotonic() - started < 15
    assert _wait(client, job.id, "cancelled").status == "cancelled"


def _wait_for_steps(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + JOB_DEADLINE_S
    while time.monotonic() < deadline:
        events = client.fine_tuning.jobs.list_events(job_id, limit=20).data
        if any(e.type == "metrics" and "loss" in (e.data or {}) for e in events):  # type: ignore[operator]
            return
        time.sleep(0.5)
    raise AssertionError("no step was trained")


def _workers(service: Any) -> list[str]:
    """Command lines of drivers and of Ray actors; idle Ray workers do not count."""
    found = []
    for process in service.family():
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "actors.main drive" in command or command.startswith("ray::TrainerRank"):
            found.append(command)
    return found


def test_bad_jobs_are_refused_before_anything_starts(
    client: openai.OpenAI, files: dict[str, str], playground_moe: Path
) -> None:
    misspelt = {"likelihood": {"scheme": "ratio_power", "gamma": {"ess": {"flor": 0.3}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        _create(client, playground_moe, files, {"type": "weighted", "weighted": misspelt})
    assert refused.value.param == "method.weighted.likelihood.gamma.ess.flor"
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="no/such-model", training_file=files["training"])
    assert refused.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="the whole cluster has") as refused:
        _create(client, playground_moe, files, {"type": "supervised"}, resources={"trainers": 500})
    assert refused.value.code == "does_not_fit"
