"""The store: everything the service must not forget, behind one object."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from modeseek_ray.jobs.agenda import Agenda, read_agenda
from modeseek_ray.jobs.attempt_store import AttemptStore
from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.driver_store import DriverStore
from modeseek_ray.jobs.engine_store import EngineStore
from modeseek_ray.jobs.event_store import EventStore
from modeseek_ray.jobs.file_store import FileStore
from modeseek_ray.jobs.job_store import JobStore
from modeseek_ray.jobs.key_store import KeyStore
from modeseek_ray.jobs.model_store import ModelStore
from modeseek_ray.jobs.queue_store import QueueStore
from modeseek_ray.jobs.tables import checkpoints, leases
from modeseek_ray.jobs.tenant_store import TenantStore
from modeseek_ray.jobs.webhook_store import WebhookStore


class Store:
    """Opens the database, brings its schema up to date, and holds one sub-store per kind of record."""

    def __init__(
        self,
        url: str,
        *,
        lease_s: float = 60.0,
        start_lease_s: float = 900.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.database = Database(url, clock=clock)
        self.jobs = JobStore(self.database)
        self.events = EventStore(self.database)
        self.queue = QueueStore(self.database)
        self.attempts = AttemptStore(self.database, lease_s=lease_s, start_lease_s=start_lease_s)
        self.drivers = DriverStore(self.database, lease_s=lease_s)
        self.files = FileStore(self.database)
        self.models = ModelStore(self.database)
        self.keys = KeyStore(self.database)
        self.tenants = TenantStore(self.database)
        self.webhooks = WebhookStore(self.database)
        self.engines = EngineStore(self.database, lease_s=lease_s, start_lease_s=start_lease_s)

    def close(self) -> None:
        self.database.close()

    def check_writable(self) -> None:
        """Raises what the database raises when nothing can be stored."""
        now = self.database.clock()
        with self.database.write() as connection:
            connection.execute(update(leases).where(leases.c.name == "probe").values(until=now))

    def agenda(self, *, validations: int, slots: int, aside: Collection[int] = ()) -> Agenda:
        """What the reconciler has to look at now (`agenda.py`)."""
        return read_agenda(self.database, validations=validations, slots=slots, aside=aside)

    def newest_checkpoints(self, job_id: str) -> list[str]:
        """Paths of a job's checkpoints, the one to resume from first; later ones are what to fall back on."""
        query = (
            select(checkpoints.c.path)
            .where(checkpoints.c.job_id == job_id, checkpoints.c.deleted_at.is_(None))
            .order_by(checkpoints.c.step.desc(), checkpoints.c.attempt.desc())
        )
        with self.database.read() as connection:
            return list(connection.execute(query).scalars())

    def hold_lease(self, name: str, holder: str, duration_s: float) -> bool:
        """Take or renew the lease `name`; False while another holder's has not run out."""
        now = self.database.clock()
        with self.database.write() as connection:
            row = connection.execute(select(leases).where(leases.c.name == name)).one_or_none()
        if row is None:
            # Free to take, for whoever comes first; on PostgreSQL two may come at once.
            with suppress(IntegrityError), self.database.write() as connection:
                connection.execute(insert(leases).values(name=name, holder="", until=0.0))
        with self.database.write() as connection:
            taken = connection.execute(
                update(leases)
                .where(leases.c.name == name, (leases.c.holder == holder) | (leases.c.until < now))
                .values(holder=holder, until=now + duration_s)
            )
            return taken.rowcount == 1

    def drop_lease(self, name: str, holder: str) -> None:
        """Let the next holder in at once."""
        with self.database.write() as connection:
            connection.execute(
                update(leases).where(leases.c.name == name, leases.c.holder == holder).values(until=0.0)
            )
