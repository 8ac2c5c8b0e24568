"""Attempts in the store: begun, launched, lost or ended by the reconciler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import StaleFenceError
from modeseek_ray.jobs.history import append_events, find_job, move_job
from modeseek_ray.jobs.records import (
    AttemptRecord,
    EventDraft,
    JobRecord,
)
from modeseek_ray.jobs.spool import undelivered
from modeseek_ray.jobs.tables import attempts


class AttemptStore:
    """What the reconciler does with attempts. Each method is one transaction."""

    def __init__(self, database: Database, *, lease_s: float = 60.0, start_lease_s: float = 900.0) -> None:
        self._database = database
        self.lease_s = lease_s
        self.start_lease_s = start_lease_s  # until the first heartbeat: Ray may have to start first

    def begin(self, job: JobRecord, token: str) -> JobRecord:
        """queued -> starting, with a fence no earlier driver has. Write the secret file first."""
        now = self._database.clock()
        attempt, fence = job.attempt + 1, job.fence + 1
        with self._database.write() as connection:
            event = EventDraft(
                f"Attempt {attempt} is starting.", data={"state": "starting", "attempt": attempt}
            )
            changes = {"attempt": attempt, "fence": fence, "section": None, "section_until": None}
            job = move_job(connection, job, "starting", event, now, **changes)
            connection.execute(
                insert(attempts).values(
                    job_id=job.id,
                    number=attempt,
                    fence=fence,
                    token_sha256=digest(token),
                    created_at=now,
                    lease_until=now + self.start_lease_s,
                    start_step=job.committed_step,
                    last_sequence=0,
                )
            )
        self._database.announce(job.id)
        return job

    def get(self, job_id: str, number: int) -> AttemptRecord | None:
        query = select(attempts).where(attempts.c.job_id == job_id, attempts.c.number == number)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else AttemptRecord.of(row)

    def launched(self, job_id: str, number: int, submission_id: str) -> None:
        with self._database.write() as connection:
            update_attempt(connection, job_id, number, submission_id=submission_id)

    def lose(
        self, job: JobRecord, reason: str, spool: Path | None = None, *, counts: bool = True
    ) -> JobRecord:
        """The attempt is over without an end of the job. Its fence is void from here on.

        What its driver could not deliver comes from its `spool`, before the loss and in the same transaction.
        `counts`: as one that got no further, of which a job has only so many.
        """
        now = self._database.clock()
        with self._database.write() as connection:
            find_job(connection, job.id, lock=True)
            _deliver(connection, job, spool, now)
            job = lose_attempt(connection, job, reason, now, counts=counts)
        self._database.announce(job.id)
        return job

    def end(
        self, job: JobRecord, state: str, event: EventDraft, spool: Path | None = None, **changes: Any
    ) -> JobRecord:
        """Put the job in a terminal state over its driver's head; a driver that still lives is refused."""
        now = self._database.clock()
        with self._database.write() as connection:
            find_job(connection, job.id, lock=True)
            _deliver(connection, job, spool, now)
            moved = move_job(connection, job, state, event, now, fence=job.fence + 1, **changes)
            update_attempt(connection, job.id, job.attempt, ended_at=now, outcome=state)
        self._database.announce(job.id)
        return moved


def append_numbered(
    connection: Connection, job_id: str, number: int, drafts: Sequence[EventDraft], now: float
) -> tuple[int, list[EventDraft]]:
    """Store a driver's events that follow the newest one known. Returns the newest now, and what was new.

    A gap in the driver's numbers ends the batch. Lock the job before.
    """
    newest = find_attempt(connection, job_id, number).last_sequence
    fresh: list[EventDraft] = []
    for draft in sorted(drafts, key=lambda d: d.attempt_sequence or 0):
        if draft.attempt_sequence == newest + 1:
            fresh.append(draft)
            newest += 1
    if fresh:
        append_events(connection, job_id, fresh, now)
        update_attempt(connection, job_id, number, last_sequence=newest)
    return newest, fresh


def _deliver(connection: Connection, job: JobRecord, spool: Path | None, now: float) -> None:
    if spool is None or job.attempt == 0:
        return
    known = find_attempt(connection, job.id, job.attempt)
    if known.ended_at is None:  # else what followed its end is in the history already
        append_numbered(
            connection, job.id, job.attempt, undelivered(spool, job.attempt, known.last_sequence), now
        )


def lose_attempt(
    connection: Connection, job: JobRecord, reason: str, now: float, *, counts: bool = True
) -> JobRecord:
    """End the job's attempt, which may be followed by another. `counts`: as one that got no further."""
    # A checkpoint may be committed just now, which does not raise the version.
    committed_step = find_job(connection, job.id, lock=True).committed_step
    start_step = connection.execute(
        select(attempts.c.start_step).where(attempts.c.job_id == job.id, attempts.c.number == job.attempt)
    ).scalar_one()
    fruitful = committed_step is not None and committed_step > (start_step or 0)
    event = EventDraft(
        f"Attempt {job.attempt} was lost: {reason}",
        level="warn",
        data={"state": "recovering", "attempt": job.attempt},
    )
    changes = {
        "fence": job.fence + 1,
        "fruitless_attempts": 0 if fruitful else job.fruitless_attempts + counts,
    }
    number = job.attempt
    job = move_job(connection, job, "recovering", event, now, **changes)
    update_attempt(connection, job.id, number, ended_at=now, outcome=reason)
    return job


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def find_attempt(connection: Connection, job_id: str, number: int) -> AttemptRecord:
    query = select(attempts).where(attempts.c.job_id == job_id, attempts.c.number == number)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise StaleFenceError(f"job {job_id} has no attempt {number}.", mend="This driver must stop.")
    return AttemptRecord.of(row)


def update_attempt(connection: Connection, job_id: str, number: int, **values: Any) -> None:
    connection.execute(
        update(attempts).where(attempts.c.job_id == job_id, attempts.c.number == number).values(**values)
    )
