"""Looks after the driver of a job: launches it, notices its loss, ends it when the job is cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.errors import ConflictError, IllegalTransitionError
from modeseek_ray.jobs.launcher import ENDED, Launcher, LaunchStatus
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import AttemptRecord, EventDraft, JobRecord
from modeseek_ray.jobs.states import ATTENDED
from modeseek_ray.jobs.store import Store

log = logging.getLogger(__name__)

# What a launcher raises while the cluster cannot be reached: ask again, rather than give the attempt up.
_UNREACHABLE = (WorkerError, OSError, TimeoutError)


@dataclass(frozen=True)
class ReconcilerSettings:
    """Times in seconds."""

    max_running_jobs: int = 1
    max_validations: int = 1
    max_fruitless_attempts: int = 3
    pass_every_s: float = 1.0
    status_every_s: float = 2.0  # how often the cluster is asked about a driver
    cancel_grace_s: float = 8.0  # for the driver to end by itself
    pause_grace_s: float = 300.0  # for the driver to end its step and save; then what is committed must do
    stop_timeout_s: float = 5.0  # for the cluster to have stopped it; then the fence alone keeps it out
    call_timeout_s: float = 20.0  # of one call of the launcher: they hang while the head is down
    leader_lease_s: float = 15.0
    capacity_every_s: float = 15.0
    # Of a driver's sections (setup, score, rollout, step, sync, ...); the others keep their own deadlines.
    deadlines_s: Mapping[str, float] = field(default_factory=dict)


class Attendant:
    """Works on one job at a time and call; what it remembers between calls only spares questions."""

    def __init__(
        self,
        store: Store,
        home: Home,
        launcher: Launcher,
        settings: ReconcilerSettings,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._home = home
        self._launcher = launcher
        self._settings = settings
        self._wake = wake
        self._asked_at: dict[str, float] = {}  # by job: when the cluster was last asked about its driver
        self._unknown_since: dict[str, float] = {}  # by submission: the cluster has not heard of it

    # starting, running, checkpointing, pausing: launch, or recover.

    async def watch(self, job: JobRecord, attempt: AttemptRecord) -> None:
        """Launch the driver if that has not been done; else see whether it lives and gets on."""
        now = self._store.database.clock()
        section = f"no progress in {job.section!r} before its deadline."
        if attempt.lease_until < now:
            await self._lose(job, attempt, "its driver sent no heartbeat and the lease ran out.")
        elif job.section_until is not None and job.section_until < now:
            await self._lose(job, attempt, section)
        elif job.state == "pausing" and job.state_at + self._settings.pause_grace_s < now:
            grace = f"{self._settings.pause_grace_s:.0f} s"
            await self._lose(job, attempt, f"it did not pause by itself within {grace}.")
        elif now - self._asked_at.get(job.id, 0.0) >= self._settings.status_every_s:
            self._asked_at[job.id] = now
            if attempt.submission_id is None:
                await self.launch(job, attempt)
            elif reason := await self._reason_of_death(attempt, attempt.submission_id, now):
                await self._lose(job, attempt, reason)

    async def launch(self, job: JobRecord, attempt: AttemptRecord) -> None:
        """Start the driver. May be called again after a crash: the launcher adopts what runs already."""
        secret = self._home.secret(job.id, attempt.number)
        try:
            submission = await self._call(self._launcher.launch(job.id, attempt.number, secret))
        except _UNREACHABLE as error:
            log.warning("%s waits for the cluster: %s", job.id, error or type(error).__name__)
            return
        except Exception as error:
            log.exception("launching %s attempt %d failed", job.id, attempt.number)
            await self._lose(
                job, attempt, f"the driver could not be started: {error or type(error).__name__}"
            )
            return
        await asyncio.to_thread(self._store.attempts.launched, job.id, attempt.number, submission)

    async def _reason_of_death(self, attempt: AttemptRecord, submission_id: str, now: float) -> str | None:
        """What the cluster knows. It may be wrong about the living, which is what the lease is for."""
        status = await self._status(submission_id)
        if status in ENDED:
            return f"its driver process ended ({status}) without a word{await self._last_words(attempt)}."
        if status != "unknown" or attempt.heartbeat_at is not None:
            self._unknown_since.pop(submission_id, None)
            return None
        since = self._unknown_since.setdefault(submission_id, now)
        if now - since <= self._store.attempts.lease_s:
            return None
        return "the cluster does not know its driver; it was probably restarted."

    async def _last_words(self, attempt: AttemptRecord) -> str:
        """Why a driver that never reached the service gave up: the last line it printed."""
        if attempt.heartbeat_at is not None or attempt.submission_id is None:
            return ""
        try:
            printed = await self._call(self._launcher.logs(attempt.submission_id))
        except Exception:
            return ""
        lines = [line.strip() for line in (printed or "").splitlines() if line.strip()]
        return f"; it printed: {lines[-1][-500:].rstrip('.')}" if lines else ""

    async def _lose(self, job: JobRecord, attempt: AttemptRecord, reason: str) -> None:
        """The fence is void before the old driver is stopped: from then on it can do nothing."""
        fresh = await asyncio.to_thread(self._store.jobs.get, job.id)
        if fresh.state not in ATTENDED - {"cancelling"} or fresh.attempt != attempt.number:
            return  # it ended, or is being ended, while we asked
        spool = self._home.spool(job.id, attempt.number)
        try:
            await asyncio.to_thread(self._store.attempts.lose, fresh, reason, spool)
        except (ConflictError, IllegalTransitionError):
            raise
        except Exception:  # a spool that the store cannot take must not keep the job from going on
            log.exception("the spool of %s attempt %d is left out", job.id, attempt.number)
            await asyncio.to_thread(self._store.attempts.lose, fresh, reason)
        if attempt.submission_id is not None:
            with suppress(Exception):
                await self._call(self._launcher.stop(attempt.submission_id))
        self.forget(job.id)
        self._wake()

    # cancelling -> cancelled

    async def end_cancelled(self, job: JobRecord) -> None:
        """Let the driver end by itself; then stop it; then end the job whatever the cluster says."""
        attempt = await asyncio.to_thread(self._store.attempts.get, job.id, job.attempt)
        grace_until = (job.cancel_at or job.state_at) + self._settings.cancel_grace_s
        submission_id = None if attempt is None else attempt.submission_id
        if submission_id is not None and not await self._ended_before(job, submission_id, grace_until):
            with suppress(Exception):
                await self._call(self._launcher.stop(submission_id), self._settings.stop_timeout_s)
            await self._ended_before(job, submission_id, grace_until + self._settings.stop_timeout_s)
        job = await asyncio.to_thread(self._store.jobs.get, job.id)
        if job.state == "cancelling":
            event = EventDraft("The job was cancelled.", data={"state": "cancelled"})
            spool = self._home.spool(job.id, job.attempt)
            await asyncio.to_thread(self._store.attempts.end, job, "cancelled", event, spool)
        self.forget(job.id)

    async def _ended_before(self, job: JobRecord, submission_id: str, limit: float) -> bool:
        """Wait until the job or its driver process has ended, at most until `limit`."""
        while self._store.database.clock() < limit:
            if (await asyncio.to_thread(self._store.jobs.get, job.id)).terminal:
                return True
            if await self._status(submission_id, timeout_s=2.0) in ENDED:
                return True
            await asyncio.sleep(0.25)
        return False

    def forget(self, job_id: str) -> None:
        """Ask about this job's next driver at once."""
        self._asked_at.pop(job_id, None)

    async def _status(self, submission_id: str, timeout_s: float | None = None) -> LaunchStatus:
        try:
            return await self._call(self._launcher.status(submission_id), timeout_s)
        except Exception as error:
            log.warning("the cluster is silent about %s: %s", submission_id, error or type(error).__name__)
            return "unknown"

    async def _call(self, call: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        return await asyncio.wait_for(call, timeout_s or self._settings.call_timeout_s)
