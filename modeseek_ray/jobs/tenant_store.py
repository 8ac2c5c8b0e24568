"""Tenants: who shares this installation, and how much of it each may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.records import Record
from modeseek_ray.jobs.tables import tenants


@dataclass(frozen=True)
class TenantRecord(Record):
    """A tenant and its limits; None = the installation's alone. See `tables.tenants`."""

    id: str
    name: str
    created_at: float
    priority: int  # higher is served first
    max_running_jobs: int | None
    max_bytes: int | None
    max_files: int | None
    requests_per_minute: int | None


class TenantStore:
    """Tenants come into being with their first key (`KeyStore.create`)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, tenant_id: str) -> TenantRecord:
        """Raises `NotFoundError`."""
        with self._database.read() as connection:
            row = connection.execute(select(tenants).where(tenants.c.id == tenant_id)).one_or_none()
        if row is None:
            raise NotFoundError(
                f"there is no tenant {tenant_id!r}.",
                code="tenant_not_found",
                mend="`modeseek keys create NAME --tenant TENANT` makes one.",
            )
        return TenantRecord.of(row)

    def all(self) -> list[TenantRecord]:
        with self._database.read() as connection:
            rows = connection.execute(select(tenants).order_by(tenants.c.created_at, tenants.c.id))
            return [TenantRecord.of(row) for row in rows]

    def change(self, tenant_id: str, **limits: Any) -> TenantRecord:
        """Set some of the limits. A new priority counts for jobs that are submitted from now on."""
        self.get(tenant_id)
        with self._database.write() as connection:
            connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(**limits))
        return self.get(tenant_id)
