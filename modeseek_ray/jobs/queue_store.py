"""The queue as it stands in the store: who waits, where, since when."""

from __future__ import annotations

import time
from threading import Lock

from sqlalchemy import Connection, func, select

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.queue import Place, places
from modeseek_ray.jobs.states import ATTENDED
from modeseek_ray.jobs.tables import attempts, jobs, tenants

# Places in a queue of so many jobs, once found, are good for so many times as long as that took (of one core): who
# polls may be told of the moment before, and the service does other things than counting.
_LONG, _PLACES_REST = 100, 20.0
_TYPICAL_OF = 20  # jobs whose length is taken for the typical one


class QueueStore:
    """Thread-safe; reads only."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._placed: tuple[tuple[int, int], dict[str, Place]] | None = None  # as of (version, slots)
        self._placed_until = 0.0  # on the monotonic clock; later it is found anew if anything was written
        self._placing = Lock()  # one looks; who asks meanwhile waits for what it finds

    def oldest_queued_at(self) -> float | None:
        """Since when the job that has waited longest is in the queue."""
        with self._database.read() as connection:
            found: float | None = connection.execute(
                select(func.min(jobs.c.state_at)).where(jobs.c.state == "queued")
            ).scalar()
        return found

    def places(self, slots: int) -> dict[str, Place]:
        """Where each queued job stands, if `slots` jobs may run at a time.

        Everybody who polls a queued job asks, so the answer is kept until something is written, and that of a
        long queue for a moment longer. (Where other processes write, too, they do not tell.)
        """
        with self._placing:
            return self._places(slots)

    def _places(self, slots: int) -> dict[str, Place]:
        asked = (self._database.version, slots)  # before the look: what is written meanwhile makes it old
        placed = self._placed
        if placed is not None and placed[0][1] == slots:
            is_new = placed[0] == asked and not self._database.is_shared
            if is_new or time.monotonic() < self._placed_until:
                return placed[1]
        began_s = time.thread_time()
        found = self._find_places(slots)
        took_s = time.thread_time() - began_s
        self._placed = asked, found
        self._placed_until = time.monotonic() + (_PLACES_REST * took_s if len(found) >= _LONG else 0.0)
        return found

    def _find_places(self, slots: int) -> dict[str, Place]:
        columns = (jobs.c.id, jobs.c.tenant_id, jobs.c.eta_s, jobs.c.state)
        query = select(*columns).where(jobs.c.state.in_(("queued", *ATTENDED)))
        with self._database.read() as connection:
            living = connection.execute(query.order_by(jobs.c.priority.desc(), jobs.c.number)).all()
            queue = [job for job in living if job.state == "queued"]
            if not queue:
                return {}
            limits = connection.execute(select(tenants.c.id, tenants.c.max_running_jobs))
            by_tenant: dict[str, int | None] = {row.id: row.max_running_jobs for row in limits}
            typical_s = self._typical_s(connection)
        attended = [job for job in living if job.state in ATTENDED]
        return places(queue, attended, slots=slots, limits=by_tenant, typical_s=typical_s)

    def _typical_s(self, connection: Connection) -> float | None:
        """Mean time from launch to success of the last jobs' last attempts."""
        took_s = (attempts.c.ended_at - attempts.c.created_at).label("took_s")
        query = (
            select(took_s)
            .where(attempts.c.outcome == "succeeded")
            .order_by(attempts.c.ended_at.desc())
            .limit(_TYPICAL_OF)
        )
        found = list(connection.execute(query).scalars())
        return sum(found) / len(found) if found else None
