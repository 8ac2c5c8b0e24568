"""The two writes every change of a job goes through: add to its history, move its state.

Both work inside a transaction the caller has opened, so that a state and its event are one commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from modeseek_ray.jobs.errors import ConflictError, IllegalTransitionError, NotFoundError
from modeseek_ray.jobs.records import EventDraft, JobRecord
from modeseek_ray.jobs.states import TERMINAL, is_legal, public_status
from modeseek_ray.jobs.tables import events, jobs
from modeseek_ray.jobs.webhook_store import announce_end


def find_job(
    connection: Connection, job_id: str, tenant_id: str | None = None, *, lock: bool = False
) -> JobRecord:
    """Read a job. Another tenant's job does not exist. Raises `NotFoundError`.

    `lock` what the same transaction then changes, or adds to: nobody else does so before it ends.
    Lock a job before its attempts, always, so that two transactions cannot wait for each other.
    """
    query = select(jobs).where(jobs.c.id == job_id)
    if lock:
        query = query.with_for_update()  # SQLite has one writer anyway, and ignores it
    if tenant_id is not None:
        query = query.where(jobs.c.tenant_id == tenant_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(
            f"there is no job {job_id!r}.", code="job_not_found", mend="List the jobs to see their ids."
        )
    return JobRecord.of(row)


def append_events(connection: Connection, job_id: str, drafts: Sequence[EventDraft], now: float) -> None:
    """Number the drafts on from the job's last event. Terminal jobs have no further history."""
    if not drafts:
        return
    taken = (
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(last_event=jobs.c.last_event + len(drafts))
        .returning(jobs.c.last_event)
    )
    first = connection.execute(taken).scalar_one() - len(drafts) + 1
    rows = [
        {
            "job_id": job_id,
            "sequence": first + i,
            "created_at": now if draft.created_at is None else draft.created_at,
            "level": draft.level,
            "type": draft.type,
            "message": draft.message,
            "data": dict(draft.data),
            "attempt": draft.attempt,
            "attempt_sequence": draft.attempt_sequence,
        }
        for i, draft in enumerate(drafts)
    ]
    connection.execute(insert(events), rows)


def move_job(
    connection: Connection, job: JobRecord, state: str, event: EventDraft, now: float, **changes: Any
) -> JobRecord:
    """One arrow of the state table, by compare-and-swap on (id, version), with its event.

    Raises `IllegalTransitionError` where the table has no such arrow and `ConflictError` when the
    job changed since `job` was read.
    """
    if not is_legal(job.state, state):
        raise IllegalTransitionError(
            f"job {job.id} is {job.state} and cannot become {state}.",
            mend="Terminal jobs never change." if job.terminal else "Wait until the job has moved on.",
        )
    values: dict[str, Any] = {"state": state, "version": job.version + 1, "state_at": now, **changes}
    if state in TERMINAL:
        values["finished_at"] = now
    swapped = connection.execute(
        update(jobs).where(jobs.c.id == job.id, jobs.c.version == job.version).values(**values)
    )
    if swapped.rowcount != 1:
        raise ConflictError(f"job {job.id} has changed since version {job.version}.", mend="Read it again.")
    append_events(connection, job.id, [event], now)
    if state in TERMINAL:
        announce_end(connection, job, public_status(state, job.committed_step), now)
    return find_job(connection, job.id)
