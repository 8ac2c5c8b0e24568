"""Files in the store: what users uploaded or registered, and what jobs wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, case, func, insert, literal, select, tuple_, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import NotFoundError, QuotaError
from modeseek_ray.jobs.records import DEFAULT_TENANT, FileRecord, Page
from modeseek_ray.jobs.tables import files, tenants


class FileStore:
    """Rows about files; the bytes are the caller's. A deleted file is hidden, its row stays."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        file_id: str,
        filename: str,
        purpose: str,
        path: Path,
        *,
        num_bytes: int,
        owned: bool,
        sha256: str | None = None,
        tenant_id: str = DEFAULT_TENANT,
    ) -> FileRecord:
        """Add a file whose bytes are complete at `path`. `owned` files are removed when deleted.

        Raises `QuotaError`, whatever else is added at the same moment.
        """
        with self._database.write() as connection:
            refuse_over_quota(connection, tenant_id, more_bytes=num_bytes if owned else 0)
            connection.execute(
                insert(files).values(
                    id=file_id,
                    tenant_id=tenant_id,
                    filename=filename,
                    purpose=purpose,
                    bytes=num_bytes,
                    path=str(path),
                    owned=owned,
                    sha256=sha256,
                    created_at=self._database.clock(),
                )
            )
        return self.get(file_id, tenant_id)

    def get(self, file_id: str, tenant_id: str | None = None) -> FileRecord:
        """Raises `NotFoundError`, also for another tenant's file."""
        query = select(files).where(files.c.id == file_id, files.c.deleted_at.is_(None))
        if tenant_id is not None:
            query = query.where(files.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(
                f"there is no file {file_id!r}.", code="file_not_found", mend="Upload it, or list the files."
            )
        return FileRecord.of(row)

    def page(
        self,
        *,
        tenant_id: str | None = None,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page[FileRecord]:
        """By time of creation."""
        query = select(files).where(files.c.deleted_at.is_(None))
        if tenant_id is not None:
            query = query.where(files.c.tenant_id == tenant_id)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        place = tuple_(files.c.created_at, files.c.id)
        query = query.order_by(*(c.desc() if order == "desc" else c.asc() for c in place.clauses))
        if after is not None:
            last = self.get(after, tenant_id)
            here = tuple_(literal(last.created_at), literal(last.id))
            query = query.where(place < here if order == "desc" else place > here)
        with self._database.read() as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([FileRecord.of(row) for row in rows[:limit]], len(rows) > limit)

    def usage(self, tenant_id: str) -> tuple[int, int]:
        """Bytes that the tenant uploaded, and how many files it keeps, registered ones included."""
        with self._database.read() as connection:
            return _usage(connection, tenant_id)

    def allowance(self, tenant_id: str) -> int | None:
        """How many bytes may come in one more file; None = any number. Raises `QuotaError`: no file more."""
        with self._database.read() as connection:
            return refuse_over_quota(connection, tenant_id, more_bytes=0, lock=False)

    def delete(self, file_id: str, tenant_id: str | None = None) -> FileRecord:
        """Hide the file. The caller removes the bytes of an owned one afterwards."""
        record = self.get(file_id, tenant_id)
        with self._database.write() as connection:
            connection.execute(
                update(files).where(files.c.id == file_id).values(deleted_at=self._database.clock())
            )
        return record


def _usage(connection: Connection, tenant_id: str) -> tuple[int, int]:
    owned_bytes = func.sum(case((files.c.owned, files.c.bytes), else_=0))
    query = select(func.coalesce(owned_bytes, 0), func.count()).where(
        files.c.tenant_id == tenant_id, files.c.purpose == "fine-tune", files.c.deleted_at.is_(None)
    )
    num_bytes, count = connection.execute(query).one()
    return int(num_bytes), int(count)


def refuse_over_quota(
    connection: Connection, tenant_id: str, *, more_bytes: int, lock: bool = True
) -> int | None:
    """Room that is left in bytes, None without a quota. Raises `QuotaError`.

    The tenant's row is locked, so that two files added at once do not pass together.
    """
    query = select(tenants.c.max_bytes, tenants.c.max_files).where(tenants.c.id == tenant_id)
    limits = connection.execute(query.with_for_update() if lock else query).one()
    used_bytes, num_files = _usage(connection, tenant_id)
    if limits.max_files is not None and num_files >= limits.max_files:
        raise QuotaError(
            f"you keep {num_files} files; {limits.max_files} are allowed.", mend="Delete some first."
        )
    if limits.max_bytes is None:
        return None
    if used_bytes + more_bytes > limits.max_bytes:
        raise QuotaError(
            f"your files would take more than {limits.max_bytes} bytes.", mend="Delete some first."
        )
    return int(limits.max_bytes) - used_bytes
