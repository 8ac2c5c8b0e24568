"""A failed job goes on as a new one, over HTTP: from its last committed checkpoint, and only once at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors import main
from actors.checkpoint import CheckpointStore
from modeseek_ray.errors import ServiceError
from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.jobs.spec import JobSpec


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


def _pause(service: Any, job_id: str, *steps: int) -> None:
    """Its driver commits checkpoints at `steps`, hears of the pause and ends."""
    driver = service.driver(job_id)

    async def speak() -> None:
        await driver.transition("running")
        for step in steps:
            directory = service.home.checkpoints(job_id) / f"step-{step}.a1"
            directory.mkdir(parents=True)
            await driver.checkpoint(step, str(directory), {})
        await driver.transition("paused")
        await driver.close()

    with service.client() as client:
        client.pause(job_id)
        asyncio.run(speak())
        assert client.job(job_id)["status"] == "paused"
    del service.launcher.secrets[job_id]  # `driver` waits for the next one's


def test_a_paused_job_goes_on_with_another_number_of_trainers(service: Any) -> None:
    """Its driver, the job as it is shown and who reads its checkpoints are all told the new number."""
    job_id = service.submit(resources={"trainers": 4, "zero_stage": 2, "scorers": 2})
    _pause(service, job_id, 2)
    with service.client() as client:
        typed = CliRunner().invoke(main.app, ["resume", job_id, "--trainers", "2", "--url", service.url])
        assert typed.exit_code == 0, typed.output
        answer = client.job(job_id)
        assert (answer["id"], answer["status"]) == (job_id, "running")
        assert (answer["resources"]["trainers"], answer["resources"]["scorers"]) == (2, 2)
        [note] = [event for event in client.events(job_id) if "trainers" in event["data"]]
        assert note["level"] == "warn" and "not exactly as before" in note["message"]
        assert (note["data"]["trainers_before"], note["data"]["trainers"]) == (4, 2)
        told = asyncio.run(service.driver(job_id).spec())
        assert told["config"]["resources"] == {"trainers": 2, "zero_stage": 2, "scorers": 2}
        assert told["attempt"] == 2 and told["checkpoint"].endswith("step-2.a1")
        assert JobSpec.read(service.home.config(job_id)).config.resources.trainers == 2
        _pause(service, job_id)
        client.resume(job_id, trainers=2)  # as many as before: nothing to say, and no further event
        assert sum("trainers" in event["data"] for event in client.events(job_id)) == 1
        client.cancel(job_id)


@pytest.mark.parametrize(
    ("resources", "asked", "message", "mend"),
    [
        (
            {"zero_stage": 3},
            {"trainers": 1},
            "ZeRO-3 can only be read by the 2 trainers",
            "zero_stage 2 or less",
        ),
        (
            {"zero_stage": 1, "dtype": "bfloat16"},
            {"trainers": 1},
            "bfloat16 checkpoint of ZeRO-1",
            "in float32",
        ),
        ({"sequence_parallel": 2}, {"trainers": 3}, "groups of so many trainers", "a multiple of it"),
        ({}, {"trainers": 0}, "greater than or equal to 1", "1"),
        ({}, {"trainers": "2"}, "valid integer", "unquoted"),
        ({}, {"scorers": 2}, "there is no such field", "trainers"),
        ({}, {"trainers": 4096}, "needs", "fewer workers"),
    ],
)
def test_trainers_that_cannot_go_on_are_refused_and_nothing_starts(
    service: Any, resources: Any, asked: Any, message: str, mend: str
) -> None:
    job_id = service.submit(resources={"trainers": 2, **resources})
    _pause(service, job_id, 2)
    service.launcher.has = Capacity(cpus=64, gpus=0, node_cpus=64, node_gpus=0)
    service.reconciler._capacity_until = 0.0
    try:
        with service.http() as http:
            before = service.home.config(job_id).read_bytes()
            body = {"resources": asked}
            refused = http.post(f"/v1/fine_tuning/jobs/{job_id}/resume", json=body)
            error = refused.json()["error"]
            assert refused.status_code == 400 and message in error["message"] and mend in error["mend"], error
            assert error["param"].startswith("resources")
            assert http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "paused"
            assert service.home.config(job_id).read_bytes() == before
            http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    finally:
        service.launcher.has = None
        service.reconciler._capacity_until = 0.0


def test_before_its_first_checkpoint_a_job_may_have_any_number_of_trainers(service: Any) -> None:
    job_id = service.submit(resources={"trainers": 2, "zero_stage": 3})
    _pause(service, job_id)
    with service.client() as client:
        assert client.resume(job_id, trainers=1)["resources"]["trainers"] == 1
        [note] = [event for event in client.events(job_id) if "trainers" in event["data"]]
        assert note["level"] == "info" and "exactly" not in note["message"]
        with pytest.raises(ServiceError, match="only a paused or failed job") as refused:
            client.resume(job_id, trainers=3)
        assert refused.value.code == "illegal_transition"
        client.cancel(job_id)


def test_a_failed_jobs_successor_may_have_other_trainers(service: Any) -> None:
    failed = service.submit(resources={"trainers": 2})
    _fail(service, failed, 2)
    with service.client() as client:
        answer = client.resume(failed, trainers=3)
        assert (answer["resumed_from"], answer["resources"]["trainers"]) == (failed, 3)
        assert client.job(failed)["resources"]["trainers"] == 2
        assert any("not exactly as before" in event["message"] for event in client.events(answer["id"]))
        assert client.resume(failed)["id"] == client.resume(failed, trainers=3)["id"] == answer["id"]
        with pytest.raises(ServiceError, match="goes on already") as refused:
            client.resume(failed, trainers=1)
        assert refused.value.code == "illegal_transition"
        client.cancel(answer["id"])


def test_a_resumption_wants_a_strict_body_or_none(service: Any) -> None:
    path = "/v1/fine_tuning/jobs/ftjob-none/resume"
    with service.http() as http:
        asked = {
            b'{"trainers": 2}': "invalid_config",
            b'{"resources": {"trainers": NaN}}': "invalid_json",
            b"[]": "invalid_config",
            b"{}": "job_not_found",
            b"": "job_not_found",
        }
        for body, code in asked.items():
            answer = http.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.json()["error"]["code"] == code, body
        plain = http.post(path, content=b"{}", headers={"content-type": "text/plain"})
        assert plain.json()["error"]["code"] == "invalid_content_type"


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
