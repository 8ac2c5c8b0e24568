"""A real job, paused in its middle and resumed: no process is left, and the weights are those of a run in one go."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

STEPS = 60


@pytest.mark.slow
def test_a_paused_job_frees_its_workers_and_resumes_exactly(
    service: Any, tiny_moe: Path, tmp_path: Path
) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    # Long enough for a pause to be heard of in the middle: drivers ask every two seconds.
    rows = [{"prompt": f"say {i} ", "completion": f"{i} " * 75} for i in range(96)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = client_model(service, tiny_moe)
    file = client.files.create(file=data, purpose="fine-tune").id
    training = {"epochs": 10, "batch_size": 16, "learning_rate": 1e-3, "checkpoint_every": 1000}
    method: Any = {"type": "weighted", "weighted": {"preset": "mode_seeking", "training": training}}

    def submit() -> str:
        return client.fine_tuning.jobs.create(model=model, training_file=file, method=method).id

    paused, whole = submit(), submit()
    until(client, paused, lambda job: job.progress["step"] >= 3)
    assert client.fine_tuning.jobs.pause(paused).status == "running"
    until(client, paused, lambda job: job.status == "paused")
    step = client.fine_tuning.jobs.checkpoints.list(paused).data[0].step_number
    assert 3 <= step < STEPS
    assert not processes_of(service, paused)
    until(client, whole, lambda job: job.status == "succeeded")  # its workers were free for this one
    assert client.fine_tuning.jobs.retrieve(paused).status == "paused"
    assert client.fine_tuning.jobs.resume(paused).status == "running"  # queued again, with steps behind it
    until(client, paused, lambda job: job.status == "succeeded")
    events = list(client.fine_tuning.jobs.list_events(paused))
    trained = [e.data["step"] for e in events if "loss" in (e.data or {})]  # type: ignore[index, operator]
    assert trained == list(range(STEPS, 0, -1))  # each step once
    assert weights_hash(service, paused) == weights_hash(service, whole)


def client_model(service: Any, model: Path) -> str:
    """The model's directory, copied under the service's allowed root."""
    import shutil

    target = service.root / "tiny-moe"
    if not target.exists():
        shutil.copytree(model, target)
    return str(target)


def until(client: openai.OpenAI, job_id: str, condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition(job := client.fine_tuning.jobs.retrieve(job_id)):
        assert job.status not in ("failed", "cancelled"), job.error
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def processes_of(service: Any, job_id: str) -> list[str]:
    """The job's driver and any trainer that is still there, after the moment it takes to end."""
    for _ in range(50):
        found = []
        for process in service.family():
            try:
                command = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if f"drive --job {job_id}" in command:
                found.append(command)
        if not found:
            break
        time.sleep(0.1)
    return found


def weights_hash(service: Any, job_id: str) -> str:
    record = json.loads((service.home / "jobs" / job_id / "results" / "job.json").read_text())
    assert record["weights_sha256"]
    return str(record["weights_sha256"])
