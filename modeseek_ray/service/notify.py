"""Wakes event streams when the store has committed something they wait for."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Notifier:
    """`notify` may be called from any thread; `listen` belongs to one event loop each."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = defaultdict(set)
        self._changes: dict[str, int] = defaultdict(int)  # of jobs that somebody listens to

    @contextmanager
    def listen(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set after each change of the job. Clear it before reading the store."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiting[job_id].add(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._waiting[job_id].discard(entry)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]
                    self._changes.pop(job_id, None)

    def changes(self, job_id: str) -> int:
        """How often the job has changed while somebody listened; asked by who listens."""
        with self._lock:
            return self._changes[job_id]

    def notify(self, job_id: str) -> None:
        with self._lock:
            entries = list(self._waiting.get(job_id, ()))
            if entries:
                self._changes[job_id] += 1
        for loop, event in entries:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    @property
    def num_listeners(self) -> int:
        with self._lock:
            return sum(map(len, self._waiting.values()))
