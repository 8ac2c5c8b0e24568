"""`jobs.launcher.Launcher` over the Ray Jobs API: one Ray job per attempt, one per inference engine.

Ray's word on a job's state is a hint, never the truth: a killed dashboard agent leaves it RUNNING
for ever. The truth is the lease in our own store. All calls have a time limit of their own, because
the API can hang while the head is down.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray.job_submission import JobStatus, JobSubmissionClient

from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.launcher import Capacity, LaunchStatus

CALL_DEADLINE_S = 20.0
Answer = TypeVar("Answer")

_STATUS: dict[JobStatus, LaunchStatus] = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "stopped",
}


class RayJobsLauncher:
    """Starts `modeseek drive` and `modeseek answer` on the cluster; entry points carry ids and paths of ours only."""

    def __init__(self, dashboard: str, home: Path, *, autoscaling: bool = False) -> None:
        self._dashboard = dashboard
        self._autoscaling = autoscaling
        self._home = home
        self._client: JobSubmissionClient | None = None

    def move(self, dashboard: str) -> None:
        """Ask this API from now on: the old head has died, and what it knew."""
        self._dashboard = dashboard
        self._client = None

    async def launch(self, job_id: str, attempt: int, secret_path: Path) -> str:
        arguments = ("--job", job_id, "--attempt", str(attempt), "--secret", str(secret_path))
        # The driver only waits; its workers hold the CPUs.
        return await self._submit(
            f"{job_id}-a{attempt}", "drive", *arguments, "--home", str(self._home), cpus=0, gpus=0
        )

    async def launch_engine(self, engine_id: str, secret_path: Path, *, cpus: float, gpus: float) -> str:
        """The engine is the entry point itself: Ray starts it where it finds room, and says so until then."""
        return await self._submit(engine_id, "answer", "--secret", str(secret_path), cpus=cpus, gpus=gpus)

    async def _submit(
        self, submission_id: str, command: str, *arguments: str, cpus: float, gpus: float
    ) -> str:
        entrypoint = shlex.join([sys.executable, "-m", "actors.main", command, *arguments])
        # A duplicate id is answered by an internal error; then the driver is there already: adopt it.
        if await self.status(submission_id) != "unknown":
            return submission_id
        try:
            await self._call(
                lambda client: client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    entrypoint_num_cpus=cpus,
                    entrypoint_num_gpus=gpus or None,
                    # Grace before SIGKILL, in seconds.
                    runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "5", "PYTHONUNBUFFERED": "1"}},
                )
            )
        except RuntimeError as error:
            if "status code 5" not in str(error):
                raise
            # A head that has just started answers before the agent that starts drivers does.
            raise _unreachable(self._dashboard, error) from error
        return submission_id

    async def stop(self, submission_id: str) -> None:
        if await self.status(submission_id) in ("pending", "running"):
            await self._call(lambda client: client.stop_job(submission_id))

    async def status(self, submission_id: str) -> LaunchStatus:
        try:
            return _STATUS[await self._call(lambda client: client.get_job_status(submission_id))]
        except RuntimeError as error:
            if "does not exist" in str(error):
                return "unknown"
            raise
        except WorkerError:
            return "unknown"

    async def logs(self, submission_id: str) -> str | None:
        try:
            return await self._call(lambda client: client.get_job_logs(submission_id))
        except RuntimeError:
            return None  # Ray was restarted and knows it no more, or keeps no log yet

    async def capacity(self) -> Capacity | None:
        """Sums over the nodes that live. A cluster that grows on demand is not asked."""
        if self._autoscaling:
            return None
        answer = await self._call(lambda client: client._do_request("GET", "/nodes?view=summary"))
        nodes = answer.json()["data"]["summary"] if answer.ok else []
        totals = [
            raylet.get("resourcesTotal") or {}
            for raylet in (node["raylet"] for node in nodes)
            if raylet.get("state") == "ALIVE"
        ]
        cpus, gpus = ([float(total.get(name, 0.0)) for total in totals] for name in ("CPU", "GPU"))
        if not any(cpus):  # not known yet, rather than nothing there
            return None
        return Capacity(sum(cpus), sum(gpus), max(cpus), max(gpus))

    async def _call(self, ask: Callable[[JobSubmissionClient], Answer]) -> Answer:
        def connected() -> Answer:
            if self._client is None:
                self._client = JobSubmissionClient(self._dashboard)
            return ask(self._client)

        try:
            return await asyncio.wait_for(asyncio.to_thread(connected), CALL_DEADLINE_S)
        except (TimeoutError, ConnectionError) as error:
            raise _unreachable(self._dashboard, error) from error


def _unreachable(dashboard: str, error: Exception) -> WorkerError:
    """The cluster is away: the reconciler tries the same attempt again, and nothing is counted as lost."""
    return WorkerError(
        f"Ray's job API at {dashboard} did not answer: {error!r}.",
        mend="Is Ray's head alive? `modeseek doctor` tells; restart `modeseek serve`.",
        code="ray_unreachable",
    )
