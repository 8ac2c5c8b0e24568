"""Connections and transactions: embedded SQLite by default, PostgreSQL by URL.

SQLite runs in WAL mode with synchronous=FULL, so that a commit that returned survives a power cut.
Exactly one connection writes, and it alone moves the log into the database: older SQLite versions
(3.40, Debian 12) can corrupt the log when two connections do that at once.

On PostgreSQL several processes write. What a transaction is about to change it reads under a row
lock (`history.find_job(lock=True)`), states move by compare-and-swap, and the leader's lease only
spares work: two leaders at once would be refused move by move. Their hosts' clocks must agree to
within a few seconds.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from modeseek_ray.errors import StorageError
from modeseek_ray.jobs.tables import to_json_text

_MIGRATION_LOCK = 0x6D6F6465  # any number that nobody else takes: "mode"
_POSTGRES_OPTIONS = {"connect_timeout": 5, "options": "-c statement_timeout=30000 -c timezone=UTC"}
_BUSY_TIMEOUT_MS = 30_000


class Database:
    """A store's connections. Safe to use from any thread. Raises `StorageError` where it cannot be opened.

    `listeners` are called with a job's id after each commit that changed the job or its events.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self.url = _parsed(url)
        self.clock = clock
        self.listeners: list[Callable[[str], None]] = []
        self.is_shared = self.url.get_backend_name() != "sqlite"  # other processes may write too
        self.version = 0  # transactions of this process that may have written
        self._writer = self._engine(writes=True)
        self._reader = self._engine(writes=False)
        try:
            self._migrate()
        except OperationalError as error:
            raise StorageError(
                f"the database cannot be opened: {error.orig}.",
                file=self.url.render_as_string(),  # without its password
                mend="Is it running, and is MODESEEK_STORE_URL right?",
                code="store_unreachable",
            ) from None

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write. It is on disk when the block is left, or nothing of it is."""
        with self._writer.begin() as connection:
            yield connection
        self.version += 1

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot."""
        with self._reader.begin() as connection:
            yield connection

    def announce(self, job_id: str) -> None:
        """Tell the listeners that a committed transaction touched this job."""
        for listener in self.listeners:
            listener(job_id)

    def _engine(self, *, writes: bool) -> Engine:
        if self.is_shared:
            return create_engine(
                self.url,
                json_serializer=to_json_text,
                pool_pre_ping=True,  # a server that was restarted has closed what we hold
                pool_size=8,
                max_overflow=24,
                isolation_level="READ COMMITTED" if writes else "REPEATABLE READ",
                execution_options={} if writes else {"postgresql_readonly": True},
                connect_args=_POSTGRES_OPTIONS,
            )
        engine = create_engine(
            self.url,
            json_serializer=to_json_text,
            # As many as threads may read at a time: to open one costs more than what most of them ask.
            pool_size=1 if writes else 64,
            max_overflow=0 if writes else 64,
            pool_timeout=60,
            connect_args={"check_same_thread": False, "timeout": _BUSY_TIMEOUT_MS / 1000},
        )
        event.listen(engine, "connect", _configure_writer if writes else _configure_reader)
        event.listen(engine, "begin", _begin_writing if writes else _begin_reading)
        return engine

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", "modeseek_ray.jobs:migrations")
        with self._writer.begin() as connection:
            if self.is_shared:  # services that start together take turns; SQLite's write lock does it there
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")


def _parsed(url: str) -> URL:
    """`postgresql://…` means the driver that is installed with us."""
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except ArgumentError:
        backend = ""
    if backend == "sqlite":
        return parsed
    if backend not in ("postgresql", "postgres"):
        raise StorageError(
            "the store's URL is neither SQLite nor PostgreSQL.",
            mend="Write MODESEEK_STORE_URL as postgresql://user:password@host:5432/database, or leave it away.",
            code="store_unreachable",
        )
    return parsed.set(drivername="postgresql+psycopg")


def _configure(connection: sqlite3.Connection) -> sqlite3.Cursor:
    connection.isolation_level = None  # we say BEGIN ourselves; Python's own would come too late
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    return cursor


def _configure_writer(connection: sqlite3.Connection, _record: Any) -> None:
    cursor = _configure(connection)
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")


def _configure_reader(connection: sqlite3.Connection, _record: Any) -> None:
    cursor = _configure(connection)
    cursor.execute("PRAGMA query_only = ON")
    cursor.execute("PRAGMA wal_autocheckpoint = 0")


def _begin_writing(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_reading(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
