"""API keys: shown once, stored as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from sqlalchemy import delete, func, insert, select, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.records import DEFAULT_TENANT, KeyRecord
from modeseek_ray.jobs.tables import keys, tenants

# Keys are 256 random bits, so a plain digest cannot be searched; a slow one would only slow requests.
_SCHEME = "msk"


class KeyStore:
    """Keys look like `msk_<id>_<secret>`; the id finds the row, the secret is compared by its hash."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Whether a key is needed, as of a mark that every change replaces. Every request asks, and an SQLite store
        # is written by this process alone.
        self._mark = object()
        self._required: tuple[object, bool] | None = None

    def create(
        self, name: str, *, tenant_id: str = DEFAULT_TENANT, scopes: tuple[str, ...] = ("all",)
    ) -> tuple[str, KeyRecord]:
        """A new key and its record. The key is not stored: this is the only time it can be read."""
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        now = self._database.clock()
        with self._database.write() as connection:
            known = connection.execute(select(tenants.c.id).where(tenants.c.id == tenant_id)).one_or_none()
            if known is None:
                connection.execute(insert(tenants).values(id=tenant_id, name=tenant_id, created_at=now))
            connection.execute(
                insert(keys).values(
                    id=key_id,
                    tenant_id=tenant_id,
                    name=name,
                    secret_sha256=_digest(secret),
                    scopes=list(scopes),
                    created_at=now,
                )
            )
        self._mark = object()
        return f"{_SCHEME}_{key_id}_{secret}", self.get(key_id)

    def get(self, key_id: str) -> KeyRecord:
        with self._database.read() as connection:
            row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no key {key_id!r}.", code="key_not_found", mend="List the keys.")
        return KeyRecord.of(row)

    def all(self) -> list[KeyRecord]:
        with self._database.read() as connection:
            return [KeyRecord.of(row) for row in connection.execute(select(keys).order_by(keys.c.created_at))]

    def required(self) -> bool:
        """Whether a key is needed at all: from the first one on, also when every key has been revoked.

        Revoking the last key must not open the service to everybody; `remove_all` does, when asked to.
        """
        mark, known = self._mark, self._required  # before the look: a key that is made meanwhile makes it old
        if known is not None and known[0] is mark and not self._database.is_shared:
            return known[1]
        with self._database.read() as connection:
            found = bool(connection.execute(select(func.count()).select_from(keys)).scalar_one())
        self._required = mark, found
        return found

    def revoke(self, key_id: str) -> None:
        self.get(key_id)
        with self._database.write() as connection:
            connection.execute(
                update(keys).where(keys.c.id == key_id).values(revoked_at=self._database.clock())
            )

    def remove_all(self) -> int:
        """Forget every key: from now on none is needed on this machine. Returns how many there were."""
        with self._database.write() as connection:
            count = connection.execute(delete(keys)).rowcount
        self._mark = object()
        return count

    def verify(self, key: str) -> KeyRecord | None:
        """The record of a key that is ours and not revoked."""
        parts = key.split("_")
        well_formed = key.isascii() and len(parts) == 3 and parts[0] == _SCHEME
        key_id, secret = (parts[1], parts[2]) if well_formed else ("", "")
        with self._database.read() as connection:
            row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
        expected = "0" * 64 if row is None else row.secret_sha256
        matches = hmac.compare_digest(expected, _digest(secret))
        return KeyRecord.of(row) if row is not None and matches and row.revoked_at is None else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
