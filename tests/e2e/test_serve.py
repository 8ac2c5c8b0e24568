"""What `modeseek serve` leaves behind when it is interrupted in the middle of a job: nothing but its state."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import psutil
import pytest

from modeseek_ray.client import Client
from modeseek_ray.jobs.states import ATTENDED
from modeseek_ray.playground import data_files
from tests.conftest import head_of
from tests.e2e.conftest import RunningService

STEPS = 16


def _processes_of(home: Path) -> list[str]:
    """Every live process that names this service's home: the service, Ray, drivers."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if str(home) in command or str(home) in process.environ().get("RAY_AUTH_TOKEN_PATH", ""):
                found.append(command[:200])
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.slow
def test_an_interrupted_service_ends_everything_and_goes_on_when_started_again(
    tmp_path: Path, playground_moe: Path, modeseek_home: Path, forks: dict[str, str]
) -> None:
    """What is interrupted are processes as they are for users; those that go on are forks."""
    training = {"epochs": 1, "batch_size": 16, "max_steps": STEPS, "checkpoint_every": 4}
    root = playground_moe.parents[1]
    with RunningService(tmp_path, root=root) as service, Client(service.url) as client:
        rows = head_of(data_files(modeseek_home)["new-task.train"], 16 * STEPS, tmp_path)
        file = client.upload(rows)["id"]
        method = {"type": "supervised", "supervised": {"training": training}}
        job = client.submit({"model": str(playground_moe), "training_file": file, "method": method})["id"]
        while not client.checkpoints(job):
            assert client.job(job)["status"] != "failed"
            time.sleep(0.2)
        assert _processes_of(tmp_path)
    assert _processes_of(tmp_path) == []
    with sqlite3.connect(f"file:{tmp_path / 'store.sqlite3'}?mode=ro", uri=True) as store:
        ((state,),) = store.execute("SELECT state FROM jobs").fetchall()
    assert state not in ATTENDED  # so that it will wait for no lease
    with RunningService(tmp_path, root=root, environment=forks) as service, Client(service.url) as client:
        ended = client.wait(job, timeout_s=400)
        steps = [e["data"]["step"] for e in client.events(job) if "loss" in (e["data"] or {})]
    assert ended["status"] == "succeeded"
    # At most `checkpoint_every` steps were trained twice.
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert len(steps) <= STEPS + training["checkpoint_every"]
