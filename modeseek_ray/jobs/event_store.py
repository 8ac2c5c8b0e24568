"""The history of jobs, as it is read and added to."""

from __future__ import annotations

from sqlalchemy import select

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.history import append_events, find_job
from modeseek_ray.jobs.records import EventDraft, EventRecord, Page
from modeseek_ray.jobs.tables import events


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
        query = (
            select(events)
            .where(events.c.job_id == job_id, events.c.sequence > sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [EventRecord.of(row) for row in connection.execute(query)]

    def page(self, job_id: str, *, before: int | None = None, limit: int = 20) -> Page[EventRecord]:
        """Newest first, older than event number `before`."""
        query = select(events).where(events.c.job_id == job_id).order_by(events.c.sequence.desc())
        if before is not None:
            query = query.where(events.c.sequence < before)
        with self._database.read() as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([EventRecord.of(row) for row in rows[:limit]], len(rows) > limit)
