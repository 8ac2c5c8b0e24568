"""Moves jobs on: validates, queues, starts, watches, recovers, ends. One background task of the service.

Each pass reads what the store says and does the next thing; it holds no state that the store does
not, except tasks in flight. So a crash anywhere is mended by the next pass of the next process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from modeseek_ray.jobs.attendant import Attendant, ReconcilerSettings
from modeseek_ray.jobs.engine_keeper import EngineKeeper
from modeseek_ray.jobs.errors import ConflictError, IllegalTransitionError
from modeseek_ray.jobs.fit import why_it_waits
from modeseek_ray.jobs.launcher import Capacity, Launcher, ValidationOutcome, Validator
from modeseek_ray.jobs.paths import Home, write_private
from modeseek_ray.jobs.records import EventDraft, JobRecord
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.structured_logs import about

__all__ = ["Reconciler", "ReconcilerSettings"]

log = logging.getLogger(__name__)


class Reconciler:
    """Run `run()` as a task of the service's event loop; `wake()` from any thread after a change."""

    def __init__(
        self,
        store: Store,
        home: Home,
        launcher: Launcher | None,
        validator: Validator | None,
        *,
        url: str,
        settings: ReconcilerSettings | None = None,
        engines: EngineKeeper | None = None,
    ) -> None:
        """Without a launcher jobs stay queued, without a validator accepted. Drivers report to `url`.

        Without `engines` no model is asked.
        """
        self._store = store
        self._home = home
        self._launcher = launcher
        self._validator = validator
        self.engines = engines
        self._capacity: Capacity | None = None
        self._capacity_until = 0.0
        self._url = url
        self.settings = settings or ReconcilerSettings()
        self._name = secrets.token_hex(8)
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._leads_until = 0.0
        self._aside: set[int] = set()  # numbers of queued jobs that a cluster like this one cannot hold
        self._aside_of: Capacity | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._attendant = (
            None if launcher is None else Attendant(store, home, launcher, self.settings, self._woken.set)
        )

    @property
    def runs_jobs(self) -> bool:
        """Whether there is a cluster to start drivers on."""
        return self._attendant is not None

    async def run(self) -> None:
        """Until cancelled. An error of one pass is logged; the next pass tries again."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._woken.clear()
                try:
                    await self.reconcile()
                except Exception:
                    log.exception("reconciler pass failed; trying again")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), self.settings.pass_every_s)
        finally:
            await self._end_tasks()
            if self.engines is not None:
                await self.engines.close()
            await asyncio.to_thread(self._store.drop_lease, "reconciler", self._name)

    def wake(self) -> None:
        """Do the next pass now rather than within `pass_every_s`."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def reconcile(self) -> None:
        """One pass over every job that something may have to be done about."""
        if not await asyncio.to_thread(self._leads):
            return
        slots = 0 if self._attendant is None else self.settings.max_running_jobs
        await self._look_at_those_aside()
        agenda = await asyncio.to_thread(
            self._store.agenda,
            validations=self.settings.max_validations,
            slots=slots,
            aside=frozenset(self._aside),
        )
        for job in agenda.coming:
            self._validate_soon(job)
        for job in agenda.recovering:
            await self._guarded(job, self._requeue(job))
        for job in agenda.to_pause:  # asked for during its validation
            event = EventDraft("The job is paused.", data={"state": "paused"})
            await self._guarded(job, asyncio.to_thread(self._store.jobs.move, job, "paused", event))
        for job in agenda.attended:
            if job.state == "cancelling":
                self._start_task("end", job, self._end(job))
            elif self._attendant is not None and job.id in agenda.attempts:
                self._start_task("watch", job, self._attendant.watch(job, agenda.attempts[job.id]))
        for job in agenda.to_start:
            if await self._fits(job):
                await self._guarded(job, self._begin(job))
            else:
                self._woken.set()  # who comes behind it may start
        if self.engines is not None:
            await self.engines.reconcile()

    async def capacity(self) -> Capacity | None:
        """What the cluster has, asked at most every `capacity_every_s`; None = not known."""
        if self._launcher is None:
            return None
        now = time.monotonic()
        if now >= self._capacity_until:
            self._capacity_until = now + self.settings.capacity_every_s
            try:
                self._capacity = await asyncio.wait_for(self._launcher.capacity(), 5.0)
            except Exception as error:
                log.warning("the cluster does not say what it has: %s", error or type(error).__name__)
                self._capacity = None
        return self._capacity

    async def logs(self, job_id: str, attempt: int) -> str | None:
        """What an attempt's driver printed. None where there is nothing, or nobody to ask."""
        record = await asyncio.to_thread(self._store.attempts.get, job_id, attempt)
        if self._launcher is None or record is None or record.submission_id is None:
            return None
        return await asyncio.wait_for(self._launcher.logs(record.submission_id), self.settings.call_timeout_s)

    def _leads(self) -> bool:
        """Whether this is the one reconciler. The lease is renewed when half of it is over."""
        now = self._store.database.clock()
        duration_s = self.settings.leader_lease_s
        if self._leads_until - now < duration_s / 2:
            held = self._store.hold_lease("reconciler", self._name, duration_s)
            self._leads_until = now + duration_s if held else 0.0
        return self._leads_until > now

    # accepted -> validating -> queued | rejected

    def _validate_soon(self, job: JobRecord) -> None:
        running = sum(kind == "validate" for kind, _ in self._tasks)
        if self._validator is not None and running < self.settings.max_validations:
            self._start_task("validate", job, self._validate(job, self._validator))

    async def _validate(self, job: JobRecord, validator: Validator) -> None:
        if job.state == "accepted":
            event = EventDraft(
                f"Validating training file: {job.config['training_file']}", data={"state": "validating"}
            )
            job = await asyncio.to_thread(self._store.jobs.move, job, "validating", event)
        try:
            outcome = await validator.validate(job.id)
        except Exception as failure:
            log.exception("validation of %s broke", job.id)
            problem = {
                "code": "validation_failed",
                "message": f"The validation itself failed: {failure}",
                "param": None,
            }
            outcome = ValidationOutcome(False, problem)
        data = {"report": dict(outcome.report)}
        if outcome.ok:
            event = EventDraft(
                "Files validated, moving job to queued state", data={"state": "queued", **data}
            )
            await asyncio.to_thread(self._store.jobs.move, job, "queued", event)
        else:
            error = {
                "code": "invalid_data",
                "message": "The job cannot be trained.",
                "param": None,
                **(outcome.error or {}),
            }
            event = EventDraft(
                f"The job was rejected: {error['message']}", "error", data={"state": "rejected", **data}
            )
            await asyncio.to_thread(self._store.jobs.move, job, "rejected", event, error=error)
        self._woken.set()

    # queued -> starting

    async def _fits(self, job: JobRecord) -> bool:
        """Whether the cluster can hold the job. One that it cannot stands aside until there is another cluster."""
        capacity = await self.capacity()
        if capacity is None:
            return True
        reason = await asyncio.to_thread(why_it_waits, self._home, job, capacity)
        if reason is None:
            return True
        self._aside.add(job.number)
        self._aside_of = capacity
        event = EventDraft(
            f"The job stands aside until the cluster has grown: {reason} Or cancel it and ask for less.",
            "warn",
        )
        await asyncio.to_thread(self._store.events.add, job.id, event)
        return False

    async def _look_at_those_aside(self) -> None:
        """They are in line again when the cluster has changed."""
        if self._aside and await self.capacity() not in (None, self._aside_of):
            self._aside.clear()

    async def _begin(self, job: JobRecord) -> None:
        """The secret is on disk before the attempt is in the store: a crash between leaves no orphan."""
        token = secrets.token_urlsafe(32)
        secret = {
            "token": token,
            "fence": job.fence + 1,
            "url": self._url,
            "job": job.id,
            "attempt": job.attempt + 1,
            "lease_s": self._store.attempts.lease_s,
            "deadlines_s": dict(self.settings.deadlines_s),
        }
        path = self._home.secret(job.id, job.attempt + 1)
        await asyncio.to_thread(write_private, path, json.dumps(secret))
        job = await asyncio.to_thread(self._store.attempts.begin, job, token)
        attempt = await asyncio.to_thread(self._store.attempts.get, job.id, job.attempt)
        if self._attendant is not None and attempt is not None:
            self._start_task("watch", job, self._attendant.watch(job, attempt))

    # recovering -> queued | paused | failed

    async def _requeue(self, job: JobRecord) -> None:
        if job.desired == "pause":  # its driver died before it had paused: what is committed is kept
            event = EventDraft("The job is paused at its last checkpoint.", data={"state": "paused"})
            await asyncio.to_thread(self._store.jobs.move, job, "paused", event)
            return
        if job.fruitless_attempts < self.settings.max_fruitless_attempts:
            event = EventDraft("The job goes on from its last checkpoint.", data={"state": "queued"})
            await asyncio.to_thread(self._store.jobs.move, job, "queued", event)
            self._woken.set()
            return
        attempt = await asyncio.to_thread(self._store.attempts.get, job.id, job.attempt)
        reason = attempt.outcome if attempt is not None else ""
        message = f"{job.fruitless_attempts} attempts in a row made no new checkpoint; the last: {reason}"
        error = {"code": "attempts_exhausted", "message": message, "param": None}
        event = EventDraft(f"The job failed. {message}", "error", data={"state": "failed"})
        await asyncio.to_thread(self._store.attempts.end, job, "failed", event, error=error)

    # cancelling -> cancelled

    async def _end(self, job: JobRecord) -> None:
        """A launch that is under way comes to its end first, so that its driver can be found."""
        launching = self._tasks.get(("watch", job.id))
        if launching is not None:
            await asyncio.wait([launching], timeout=self.settings.cancel_grace_s / 2)
        if self._attendant is not None:
            await self._attendant.end_cancelled(job)

    # Common.

    def _start_task(self, kind: str, job: JobRecord, work: Coroutine[Any, Any, None]) -> None:
        """At most one task of a kind per job."""
        key = (kind, job.id)
        if key in self._tasks:
            work.close()
            return
        task = asyncio.create_task(self._guarded(job, work))
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _guarded(self, job: JobRecord, work: Coroutine[Any, Any, Any]) -> None:
        """Another writer may be faster: then the next pass decides anew from what the store says."""
        try:
            with about(job=job.id, attempt=job.attempt):
                await work
        except (ConflictError, IllegalTransitionError) as error:
            log.debug("%s moved on meanwhile: %s", job.id, error)
        except Exception:
            with about(job=job.id, attempt=job.attempt):
                log.exception("reconciling %s failed; trying again", job.id)

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
