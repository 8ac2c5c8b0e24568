"""Real jobs, paused in their middle and resumed: no process is left, and the weights are those of a run in one go."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from modeseek_ray.playground import data_files
from tests.conftest import head_of
from tests.faults.jobs import online

OFFLINE_STEPS, ROUNDS = 36, 24
WORKERS = ("ray::TrainerRank", "ray::GeneratorEngine", "ray::ReferenceModel")


@pytest.fixture
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")


@pytest.mark.slow
def test_a_paused_job_frees_its_workers_and_resumes_exactly(
    service: Any, client: openai.OpenAI, tiny_moe: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say {i} ", "completion": f"{i} " * 75} for i in range(96)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = client_model(service, tiny_moe)
    file = client.files.create(file=data, purpose="fine-tune").id
    training = {"epochs": 6, "batch_size": 16, "learning_rate": 1e-3, "checkpoint_every": 1000}
    method: Any = {"type": "weighted", "weighted": {"preset": "mode_seeking", "training": training}}

    def submit() -> str:
        return client.fine_tuning.jobs.create(model=model, training_file=file, method=method).id

    paused_and_whole(service, client, submit, OFFLINE_STEPS, {"ray::TrainerRank"})


@pytest.mark.slow
def test_a_paused_online_job_frees_its_engine_too_and_resumes_exactly(
    service: Any, client: openai.OpenAI, playground_dense: Path, modeseek_home: Path, tmp_path: Path
) -> None:
    """Float32, staleness 0: what the new engine writes is what the old one would have written."""
    prompts = head_of(data_files(modeseek_home)["new-task.prompts"], 16, tmp_path)
    file = client.files.create(file=prompts, purpose="fine-tune").id
    training = {"epochs": 20, "max_steps": ROUNDS, "learning_rate": 1e-4, "checkpoint_every": 1000}
    method: Any = online(training)

    def submit() -> str:
        jobs = client.fine_tuning.jobs
        return jobs.create(model=str(playground_dense), training_file=file, method=method).id

    paused_and_whole(service, client, submit, ROUNDS, {"ray::TrainerRank", "ray::GeneratorEngine"})


def paused_and_whole(
    service: Any, client: openai.OpenAI, submit: Callable[[], str], steps: int, kinds: set[str]
) -> None:
    """Two jobs that are the same; the first is paused, and the second runs meanwhile. `kinds` of workers run.

    Drivers ask every two seconds what is wanted; lest a fast machine be at the last step by then, the
    trainers stand still until it was asked.
    """
    jobs = client.fine_tuning.jobs
    paused, whole = submit(), submit()
    until(client, paused, lambda job: job.progress["step"] >= 2)
    workers = workers_of_the_running_job(service)
    assert kinds <= set(workers.values())
    trainers = [process for process, kind in workers.items() if kind == "ray::TrainerRank"]
    for trainer in trainers:
        trainer.suspend()
    assert jobs.pause(paused).status == "running"
    await_heartbeats(service, paused, 2)  # the first may have been on its way before
    for trainer in trainers:
        trainer.resume()
    until(client, paused, lambda job: job.status == "paused")
    step = jobs.checkpoints.list(paused).data[0].step_number
    assert 2 <= step < steps
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive and not drivers_of(service, paused)
    until(client, whole, lambda job: job.status == "succeeded")  # its workers were free for this one
    assert jobs.retrieve(paused).status == "paused"
    assert jobs.resume(paused).status == "running"  # queued again, with steps behind it
    until(client, paused, lambda job: job.status == "succeeded")
    events = list(jobs.list_events(paused))
    trained = [e.data["step"] for e in events if "loss" in (e.data or {})]  # type: ignore[index, operator]
    assert trained == list(range(steps, 0, -1))  # each step once
    assert weights_hash(service, paused) == weights_hash(service, whole)


def client_model(service: Any, model: Path) -> str:
    """The model's directory, copied under the service's allowed root."""
    import shutil

    target = service.root / "tiny-moe"
    if not target.exists():
        shutil.copytree(model, target)
    return str(target)


def await_heartbeats(service: Any, job_id: str, count: int) -> None:
    """Return when the job's driver has been answered `count` times more."""
    deadline = time.monotonic() + 60
    query = "SELECT max(heartbeat_at) FROM attempts WHERE job_id = ?"
    heard = set()
    with closing(sqlite3.connect(service.home / "store.sqlite3")) as store:
        while len(heard) <= count:
            heard.add(store.execute(query, [job_id]).fetchone())
            assert time.monotonic() < deadline, "its driver is silent"
            time.sleep(0.1)


def until(client: openai.OpenAI, job_id: str, condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition(job := client.fine_tuning.jobs.retrieve(job_id)):
        assert job.status not in ("succeeded", "failed", "cancelled"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def workers_of_the_running_job(service: Any) -> dict[psutil.Process, str]:
    """Trainers, engines and scorers, with what they have started: process -> kind of the worker.

    One job runs at a time, so all of them are its own. Ray puts class and method into a worker's title.
    """
    found: dict[psutil.Process, str] = {}
    for process in service.family():
        kind = next((kind for kind in WORKERS if _command(process).startswith(kind)), None)
        if kind is not None:
            found |= dict.fromkeys([process, *process.children(recursive=True)], kind)
    return found


def drivers_of(service: Any, job_id: str) -> list[str]:
    """The job's driver, after the moment it takes to end."""
    for _ in range(300):
        commands = [_command(process) for process in service.family()]
        found = [command for command in commands if f"drive --job {job_id}" in command]
        if not found:
            break
        time.sleep(0.1)
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def weights_hash(service: Any, job_id: str) -> str:
    record = json.loads((service.home / "jobs" / job_id / "results" / "job.json").read_text())
    assert record["weights_sha256"]
    return str(record["weights_sha256"])
