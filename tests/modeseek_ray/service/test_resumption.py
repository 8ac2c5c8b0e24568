"""A failed job goes on as a new one, over HTTP: from its last committed checkpoint, and only once at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint import CheckpointStore
from modeseek_ray.errors import ServiceError


def _fail(service: Any, job_id: str, *steps: int) -> None:
    """What its driver says: checkpoints at `steps`, then the end."""
    driver = service.driver(job_id)
    checkpoints = CheckpointStore(service.home.checkpoints(job_id))

    async def speak() -> None:
        await driver.transition("running")
        for step in steps:
            directory = checkpoints.begin(step, 1)
            (directory / "shard").write_text(f"weights of step {step}")
            path = checkpoints.finish(directory, {"step": step})
            await driver.checkpoint(step, str(path), {"train_loss": 1.0})
        await driver.transition("failed", error={"code": "numerics", "message": "the loss is nan."})
        await driver.close()

    results = service.home.results(job_id)
    results.mkdir(parents=True, exist_ok=True)
    (results / "metrics.csv").write_text("step,loss\n1,2.0\n")
    asyncio.run(speak())


def test_a_failed_job_goes_on_as_a_new_one_from_its_last_checkpoint(service: Any, until: Any) -> None:
    failed = service.submit()
    _fail(service, failed, 2, 4)
    with service.client() as client:
        before, events = client.job(failed), client.events(failed)
        answer = client.resume(failed)
        assert answer["id"] != failed
        assert (answer["resumed_from"], answer["status"]) == (failed, "validating_files")
        assert (answer["last_checkpoint_step"], answer["progress"]["step"]) == (4, 4)
        same = ("model", "training_file", "method", "seed")
        assert [answer[key] for key in same] == [before[key] for key in same]
        assert client.resume(failed)["id"] == answer["id"]  # an answer that was lost starts no third job
        assert (client.job(failed), client.events(failed)) == (before, events)  # what has ended never changes
        new = answer["id"]
        driver = service.driver(new)
        told = asyncio.run(driver.spec())
        assert (told["job_id"], told["attempt"]) == (new, 1)
        assert told["checkpoint"] == str(service.home.checkpoints(new) / "step-4.a0")
        assert client.checkpoints(new)[0]["step_number"] == 4
        client.cancel(new)
    # What that driver would find: a checkpoint that verifies, and the history before it.
    checkpoints = CheckpointStore(service.home.checkpoints(new))
    checkpoints.forget_uncommitted(Path(told["checkpoint"]))
    latest = checkpoints.latest()
    assert latest is not None and checkpoints.read_controller(latest) == {"step": 4}
    assert (service.home.results(new) / "metrics.csv").is_file()


def test_after_its_successor_has_ended_a_failed_job_may_have_another(service: Any, until: Any) -> None:
    failed = service.submit()
    _fail(service, failed)
    with service.client() as client:
        first = client.resume(failed)
        assert (first["last_checkpoint_step"], first["progress"]["step"]) == (None, 0)
        client.cancel(first["id"])
        until(lambda: client.job(first["id"])["status"] == "cancelled")
        second = client.resume(failed)
        assert second["id"] not in (failed, first["id"])
        client.cancel(second["id"])
        until(lambda: client.job(second["id"])["status"] == "cancelled")
        with pytest.raises(ServiceError) as refused:
            client.resume(first["id"])
        assert refused.value.code == "illegal_transition"


def test_what_has_been_deleted_since_is_missed_in_words(service: Any) -> None:
    failed = service.submit()
    _fail(service, failed, 2)
    with service.client() as client:
        client.delete_file(client.job(failed)["training_file"])
        number = len(client.jobs(limit=100))
        with pytest.raises(ServiceError) as refused:
            client.resume(failed)
        assert refused.value.code == "file_not_found"
        assert len(client.jobs(limit=100)) == number
