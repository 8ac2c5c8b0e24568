"""The launcher against a job API that misbehaves as Ray's was seen to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from actors.ray_jobs import RayJobsLauncher
from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.launcher import Capacity


class JobApi:
    """Holds jobs by id; answers submissions with the given failures first."""

    def __init__(self, *failures: Exception) -> None:
        self.jobs: dict[str, str] = {}
        self._failures = list(failures)

    def submit_job(self, *, entrypoint: str, submission_id: str, **_: Any) -> str:
        if self._failures:
            raise self._failures.pop(0)
        assert submission_id not in self.jobs
        self.jobs[submission_id] = entrypoint
        return submission_id

    def get_job_status(self, submission_id: str) -> JobStatus:
        if submission_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist.")
        return JobStatus.RUNNING


def _launcher(api: JobApi) -> RayJobsLauncher:
    launcher = RayJobsLauncher("http://127.0.0.1:1", Path("/home"))
    launcher._client = api  # type: ignore[assignment]
    return launcher


async def test_a_head_that_is_not_ready_is_away_and_not_a_lost_attempt() -> None:
    busy = RuntimeError(
        "Request failed with status code 500: No available agent to submit job, try again later."
    )
    api = JobApi(busy)
    launcher = _launcher(api)
    with pytest.raises(WorkerError) as away:
        await launcher.launch("ftjob-1", 1, Path("/secret.json"))
    assert away.value.code == "ray_unreachable"
    assert await launcher.launch("ftjob-1", 1, Path("/secret.json")) == "ftjob-1-a1"


async def test_a_mistake_of_ours_is_not_taken_for_an_absence() -> None:
    refused = RuntimeError("Request failed with status code 400: Invalid runtime_env.")
    with pytest.raises(RuntimeError, match="status code 400"):
        await _launcher(JobApi(refused)).launch("ftjob-1", 1, Path("/secret.json"))


async def test_a_driver_that_is_there_is_adopted() -> None:
    api = JobApi()
    launcher = _launcher(api)
    first = await launcher.launch("ftjob-1", 1, Path("/secret.json"))
    assert await launcher.launch("ftjob-1", 1, Path("/secret.json")) == first
    assert len(api.jobs) == 1


async def test_the_entry_point_carries_ids_and_paths_alone() -> None:
    api = JobApi()
    await _launcher(api).launch("ftjob-1", 2, Path("/home/secret.json"))
    command = api.jobs["ftjob-1-a2"]
    assert command.endswith("drive --job ftjob-1 --attempt 2 --secret /home/secret.json --home /home")


class Nodes(JobApi):
    """Answers what Ray's dashboard answers about its nodes."""

    def __init__(self, *raylets: dict[str, Any]) -> None:
        super().__init__()
        self._raylets = raylets

    def _do_request(self, method: str, endpoint: str) -> Any:
        assert (method, endpoint) == ("GET", "/nodes?view=summary")
        summary = [{"hostname": "x", "raylet": raylet} for raylet in self._raylets]
        return SimpleNamespace(ok=True, json=lambda: {"data": {"summary": summary}})


async def test_what_the_cluster_has_is_summed_over_the_nodes_that_live() -> None:
    alive = {"state": "ALIVE", "resourcesTotal": {"CPU": 8.0, "GPU": 1.0}}
    small = {"state": "ALIVE", "resourcesTotal": {"CPU": 2.0}}
    dead = {"state": "DEAD", "resourcesTotal": {"CPU": 64.0}}
    assert await _launcher(Nodes(alive, small, dead)).capacity() == Capacity(10, 1, 8, 1)
    for unknown in (Nodes(), Nodes({}), Nodes({"state": "ALIVE"})):
        assert await _launcher(unknown).capacity() is None
    growing = RayJobsLauncher("http://127.0.0.1:1", Path("/home"), autoscaling=True)
    assert await growing.capacity() is None
