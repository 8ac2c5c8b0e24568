"""Connections and transactions: embedded SQLite by default, PostgreSQL by URL.

SQLite runs in WAL mode with synchronous=FULL, so that a commit that returned survives a power cut.
Exactly one connection writes, and it alone moves the log into the database: older SQLite versions
(3.40, Debian 12) can corrupt the log when two connections do that at once.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url

from modeseek_ray.jobs.tables import to_json_text

_BUSY_TIMEOUT_MS = 30_000


class Database:
    """One writer, many readers. Safe to use from any thread.

    `listeners` are called with a job's id after each commit that changed the job or its events.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self.url = make_url(url)
        self.clock = clock
        self.listeners: list[Callable[[str], None]] = []
        self._sqlite = self.url.get_backend_name() == "sqlite"
        self._writer = self._engine(writes=True)
        self._reader = self._engine(writes=False)
        self._migrate()

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write. It is on disk when the block is left, or nothing of it is."""
        with self._writer.begin() as connection:
            yield connection

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
        if not self._sqlite:
            return create_engine(
                self.url,
                json_serializer=to_json_text,
                pool_pre_ping=True,
                isolation_level="READ COMMITTED" if writes else "REPEATABLE READ",
            )
        engine = create_engine(
            self.url,
            json_serializer=to_json_text,
            pool_size=1 if writes else 8,
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
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")


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
