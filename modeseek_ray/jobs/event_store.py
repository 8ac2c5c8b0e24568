"""The history of jobs, as it is read and added to."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.history import append_events, find_job
from modeseek_ray.jobs.records import EventDraft, EventRecord, Page
from modeseek_ray.jobs.states import TERMINAL
from modeseek_ray.jobs.tables import events, jobs


@dataclass(frozen=True)
class News:
    """What a stream has not told yet, as of one moment."""

    events: list[EventRecord]
    is_over: bool  # nothing follows these, ever


class EventStore:
    """Thread-safe; each method is one transaction. What changes a job's state writes its event itself."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, job_id: str, event: EventDraft) -> None:
        """Add a line to the history of a job that has not ended; after its end nothing is added."""
        with self._database.write() as connection:
            if find_job(connection, job_id, lock=True).terminal:
                return
            append_events(connection, job_id, [event], self._database.clock())
        self._database.announce(job_id)

    def after(self, job_id: str, sequence: int, limit: int = 500) -> list[EventRecord]:
        """The next events in order."""
        with self._database.read() as connection:
            return self._after(connection, job_id, sequence, limit)

    def news(self, job_id: str, sequence: int, limit: int = 500) -> News:
        """The next events in order, and whether they are the last."""
        with self._database.read() as connection:
            job = connection.execute(select(jobs.c.state, jobs.c.last_event).where(jobs.c.id == job_id)).one()
            found = self._after(connection, job_id, sequence, limit)
        told = found[-1].sequence if found else sequence
        return News(found, job.state in TERMINAL and told >= job.last_event)

    def page(self, job_id: str, *, before: int | None = None, limit: int = 20) -> Page[EventRecord]:
        """Newest first, older than event number `before`."""
        query = select(events).where(events.c.job_id == job_id).order_by(events.c.sequence.desc())
        if before is not None:
            query = query.where(events.c.sequence < before)
        with self._database.read() as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([EventRecord.of(row) for row in rows[:limit]], len(rows) > limit)

    def _after(self, connection: Connection, job_id: str, sequence: int, limit: int) -> list[EventRecord]:
        query = (
            select(events)
            .where(events.c.job_id == job_id, events.c.sequence > sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        return [EventRecord.of(row) for row in connection.execute(query)]
