"""Webhook endpoints, and the outbox of events they have not confirmed yet.

An event enters the outbox in the transaction that ends its job (`announce_end`), so it is told exactly
when the job has ended, crash or not. It leaves when the endpoint has answered with 2xx, or when
`RETRIES_S` is used up.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.records import JobRecord, Page, Record, new_id
from modeseek_ray.jobs.tables import webhook_deliveries, webhook_endpoints

EVENT_TYPES = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
RETRIES_S = (
    5,
    30,
    120,
    600,
    3600,
    6 * 3600,
    24 * 3600,
    48 * 3600,
)  # after the first, the second, ... failure
CLAIM_S = 60.0  # a try that was not reported back by then was cut off by a crash: try again
OLD_SECRET_S = 24 * 3600.0


@dataclass(frozen=True)
class EndpointRecord(Record):
    """Where to tell a tenant's events, and what to sign them with."""

    id: str
    tenant_id: str
    name: str
    url: str
    event_types: list[str]
    secret: str
    old_secret: str | None
    old_secret_until: float | None
    created_at: float
    updated_at: float

    def signing_secrets(self, now: float) -> list[str]:
        """The secret, and the one before it where it was kept."""
        old = [self.old_secret] if self.old_secret and (self.old_secret_until or 0.0) > now else []
        return [self.secret, *old]


@dataclass(frozen=True)
class DeliveryRecord(Record):
    """One event for one endpoint."""

    endpoint_id: str
    event_id: str
    event_type: str
    job_id: str
    created_at: float
    tries: int
    next_at: float | None
    delivered_at: float | None
    problem: str | None


class WebhookStore:
    """Endpoints are a tenant's; deliveries are the service's. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant_id: str, name: str, url: str, event_types: Sequence[str]) -> EndpointRecord:
        endpoint_id, now = new_id("whe"), self._database.clock()
        with self._database.write() as connection:
            connection.execute(
                insert(webhook_endpoints).values(
                    id=endpoint_id,
                    tenant_id=tenant_id,
                    name=name,
                    url=url,
                    event_types=list(event_types),
                    secret=new_secret(),
                    created_at=now,
                    updated_at=now,
                )
            )
        return self.get(endpoint_id, tenant_id)

    def get(self, endpoint_id: str, tenant_id: str | None = None) -> EndpointRecord:
        """Raises `NotFoundError`, also for another tenant's."""
        query = select(webhook_endpoints).where(
            webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.deleted_at.is_(None)
        )
        if tenant_id is not None:
            query = query.where(webhook_endpoints.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(
                f"there is no webhook endpoint {endpoint_id[:128]!r}.",
                code="webhook_not_found",
                mend="List them to see their ids.",
            )
        return EndpointRecord.of(row)

    def page(self, tenant_id: str, *, after: str | None = None, limit: int = 20) -> Page[EndpointRecord]:
        """Newest first."""
        table = webhook_endpoints.c
        query = select(webhook_endpoints).where(table.tenant_id == tenant_id, table.deleted_at.is_(None))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(table.created_at.desc(), table.id.desc())).all()
        found = [EndpointRecord.of(row) for row in rows]
        if after is not None:
            last = self.get(after, tenant_id)
            found = found[found.index(last) + 1 :]
        return Page(found[:limit], len(found) > limit)

    def change(self, endpoint_id: str, tenant_id: str, **values: Any) -> EndpointRecord:
        """Other name, URL or event types. What waits in the outbox goes to the new URL."""
        record = self.get(endpoint_id, tenant_id)
        changed = {key: value for key, value in values.items() if getattr(record, key) != value}
        if changed:
            self._update(endpoint_id, updated_at=self._database.clock(), **changed)
        return self.get(endpoint_id, tenant_id)

    def rotate(self, endpoint_id: str, tenant_id: str, *, keep_old: bool) -> EndpointRecord:
        """A new secret; the old one may go on signing beside it for a day."""
        record, now = self.get(endpoint_id, tenant_id), self._database.clock()
        self._update(
            endpoint_id,
            secret=new_secret(),
            old_secret=record.secret if keep_old else None,
            old_secret_until=now + OLD_SECRET_S if keep_old else None,
            updated_at=now,
        )
        return self.get(endpoint_id, tenant_id)

    def delete(self, endpoint_id: str, tenant_id: str) -> None:
        """Nothing is told to it any more, not even what waits."""
        self.get(endpoint_id, tenant_id)
        now = self._database.clock()
        with self._database.write() as connection:
            _update_endpoint(connection, endpoint_id, deleted_at=now)
            connection.execute(
                update(webhook_deliveries)
                .where(webhook_deliveries.c.endpoint_id == endpoint_id)
                .values(next_at=None)
            )

    def claim(self, limit: int = 32) -> list[DeliveryRecord]:
        """Deliveries that are due, for this caller alone until `CLAIM_S` have passed."""
        now = self._database.clock()
        table = webhook_deliveries
        query = select(table).where(table.c.next_at <= now).order_by(table.c.next_at).limit(limit)
        with self._database.read() as connection:
            due = [DeliveryRecord.of(row) for row in connection.execute(query)]
        if not due:
            return []
        with self._database.write() as connection:
            return [delivery for delivery in due if self._take(connection, delivery, now)]

    def report(self, delivery: DeliveryRecord, problem: str | None) -> None:
        """The try's outcome: delivered, or what went wrong, and when to try again."""
        now, tries = self._database.clock(), delivery.tries + 1
        values: dict[str, Any] = {"tries": tries, "problem": problem}
        if problem is None:
            values |= {"delivered_at": now, "next_at": None}
        else:
            values["next_at"] = now + RETRIES_S[tries - 1] if tries <= len(RETRIES_S) else None
        with self._database.write() as connection:
            connection.execute(update(webhook_deliveries).where(*_key(delivery)).values(**values))

    def waiting(self) -> int:
        """Events that some endpoint has not confirmed, and that are not given up."""
        query = select(func.count()).where(webhook_deliveries.c.next_at.is_not(None))
        with self._database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def deliveries(self, endpoint_id: str) -> list[DeliveryRecord]:
        """All that was ever for this endpoint, oldest first."""
        query = select(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint_id)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(webhook_deliveries.c.created_at))
            return [DeliveryRecord.of(row) for row in rows]

    def _take(self, connection: Connection, delivery: DeliveryRecord, now: float) -> bool:
        """Compare-and-swap on `next_at`: of several services one tells the event."""
        unchanged = webhook_deliveries.c.next_at == delivery.next_at
        taken = connection.execute(
            update(webhook_deliveries).where(*_key(delivery), unchanged).values(next_at=now + CLAIM_S)
        )
        return taken.rowcount == 1

    def _update(self, endpoint_id: str, **values: Any) -> None:
        with self._database.write() as connection:
            _update_endpoint(connection, endpoint_id, **values)


def announce_end(connection: Connection, job: JobRecord, status: str, now: float) -> None:
    """Put the end of `job` into the outbox of every endpoint of its tenant that asked for such events."""
    event_type = f"fine_tuning.job.{status}"
    query = select(webhook_endpoints.c.id, webhook_endpoints.c.event_types).where(
        webhook_endpoints.c.tenant_id == job.tenant_id, webhook_endpoints.c.deleted_at.is_(None)
    )
    event_id = new_id("evt")
    rows = [
        {
            "endpoint_id": row.id,
            "event_id": event_id,
            "event_type": event_type,
            "job_id": job.id,
            "created_at": now,
            "tries": 0,
            "next_at": now,
        }
        for row in connection.execute(query)
        if event_type in row.event_types
    ]
    if rows:
        connection.execute(insert(webhook_deliveries), rows)


def event_body(delivery: DeliveryRecord) -> str:
    """The event in JSON, as OpenAI's clients unwrap it: what is signed and sent, byte for byte."""
    event = {
        "id": delivery.event_id,
        "object": "event",
        "created_at": int(delivery.created_at),
        "type": delivery.event_type,
        "data": {"id": delivery.job_id},
    }
    return json.dumps(event, separators=(",", ":"))


def new_secret() -> str:
    """As the Standard Webhooks specification writes them: 32 random bytes."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def _update_endpoint(connection: Connection, endpoint_id: str, **values: Any) -> None:
    connection.execute(
        update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id).values(**values)
    )


def _key(delivery: DeliveryRecord) -> tuple[Any, Any]:
    return (
        webhook_deliveries.c.endpoint_id == delivery.endpoint_id,
        webhook_deliveries.c.event_id == delivery.event_id,
    )
