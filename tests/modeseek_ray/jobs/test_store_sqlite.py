"""What a store that one process alone writes, on SQLite, need not ask twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, event

from modeseek_ray.jobs.store import Store


def test_a_key_that_is_made_while_one_looks_is_needed_from_then_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of the look must not keep the service open."""
    read = store.database.read

    @contextmanager
    def slow_read() -> Iterator[Connection]:
        monkeypatch.setattr(store.database, "read", read)
        with read() as connection:
            yield connection
        store.keys.create("meanwhile")

    monkeypatch.setattr(store.database, "read", slow_read)
    assert not store.keys.required()  # as of that moment
    assert store.keys.required()


def test_what_every_request_asks_is_remembered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = store.keys.required()
    monkeypatch.setattr(store.database, "read", None)
    assert store.keys.required() is answers is False


def test_connections_that_read_are_kept_for_the_next(store: Store) -> None:
    """To open one costs more than most of what is asked."""
    opened: list[object] = []
    event.listen(store.database._reader, "connect", lambda *_: opened.append(1))
    together = threading.Barrier(40)

    def look(_: int) -> None:
        with store.database.read():
            together.wait(30)

    with ThreadPoolExecutor(40) as threads:
        for _ in range(2):
            list(threads.map(look, range(40)))
    assert len(opened) <= 40
