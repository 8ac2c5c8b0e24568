"""What a pass of the reconciler has to look at: never the whole queue, however long that is.

Jobs with a driver, or between two, are few; of those that wait to be validated or started only the first
in line matter. An index holds all that is asked of the others, so that a pass over 10^4 of them takes as
long as one over ten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Select, select, tuple_

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.queue import startable
from modeseek_ray.jobs.records import AttemptRecord, JobRecord
from modeseek_ray.jobs.states import ATTENDED
from modeseek_ray.jobs.tables import attempts, jobs, tenants

_IN_LINE = (jobs.c.priority.desc(), jobs.c.number)


@dataclass(frozen=True)
class Agenda:
    """Jobs that something may have to be done about, each list first in line first."""

    coming: list[JobRecord]  # to be validated
    attended: list[JobRecord]  # a driver may live
    attempts: dict[str, AttemptRecord]  # of those, by job: the one it has now
    recovering: list[JobRecord]
    to_pause: list[JobRecord]  # queued, but a pause was asked for meanwhile
    to_start: list[JobRecord]


def read_agenda(database: Database, *, validations: int, slots: int, aside: Collection[int] = ()) -> Agenda:
    """As of one moment. At most `validations` jobs to be validated; `slots` is how many may run in all.

    Jobs with a number in `aside` are not started, and keep nobody waiting.
    """
    with database.read() as connection:
        coming = jobs.c.state.in_(("accepted", "validating"))
        attended = _read(connection, _jobs(jobs.c.state.in_(ATTENDED)))
        waits_for_pause = (jobs.c.state == "queued") & (jobs.c.desired == "pause")
        return Agenda(
            coming=_read(connection, _jobs(coming).limit(validations)),
            attended=attended,
            attempts=_newest_attempts(connection, attended),
            recovering=_read(connection, _jobs(jobs.c.state == "recovering")),
            to_pause=_read(connection, _jobs(waits_for_pause)),
            to_start=_to_start(connection, attended, slots, aside),
        )


def _newest_attempts(connection: Connection, attended: list[JobRecord]) -> dict[str, AttemptRecord]:
    """One look for all: every pass asks."""
    if not attended:
        return {}
    numbers = [(job.id, job.attempt) for job in attended]
    query = select(attempts).where(tuple_(attempts.c.job_id, attempts.c.number).in_(numbers))
    found = [AttemptRecord.of(row) for row in connection.execute(query)]
    return {attempt.job_id: attempt for attempt in found}


def _to_start(
    connection: Connection, attended: list[JobRecord], slots: int, aside: Collection[int]
) -> list[JobRecord]:
    """Read along the line until every slot is taken."""
    if len(attended) >= slots:
        return []
    rows = connection.execute(
        select(tenants.c.id, tenants.c.max_running_jobs).where(tenants.c.max_running_jobs.is_not(None))
    )
    limits: dict[str, int] = {row.id: row.max_running_jobs for row in rows}
    running = Counter(job.tenant_id for job in attended)
    at_limit = [tenant_id for tenant_id, limit in limits.items() if running[tenant_id] >= limit]
    line = (
        select(jobs.c.number, jobs.c.tenant_id)
        .where(jobs.c.state == "queued", jobs.c.desired == "run")
        .order_by(*_IN_LINE)
    )
    if at_limit:
        line = line.where(jobs.c.tenant_id.not_in(at_limit))
    with connection.execution_options(stream_results=True).execute(line) as waiting:
        queue = (job for job in waiting if job.number not in aside)
        numbers = [job.number for job in startable(queue, attended, slots=slots, limits=limits)]
    return _read(connection, _jobs(jobs.c.number.in_(numbers)))


def _jobs(which: ColumnElement[bool]) -> Select[tuple[object, ...]]:
    return select(jobs).where(which).order_by(*_IN_LINE)


def _read(connection: Connection, query: Select[tuple[object, ...]]) -> list[JobRecord]:
    return [JobRecord.of(row) for row in connection.execute(query)]
