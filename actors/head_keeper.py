"""Ray's head as long as the service lives: one that has died is started again, on ports of its own.

Drivers and workers die with their head; their jobs get new attempts when the new one is there. All
that needs to know is where its Jobs API is now.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from actors import ray_head
from modeseek_ray.errors import WorkerError

log = logging.getLogger(__name__)

EVERY_S = 2.0
RETRY_S = 30.0


class HeadKeeper:
    """`with HeadKeeper(directory, num_cpus) as keeper:`; the head is ended with the block."""

    def __init__(self, directory: Path, num_cpus: int) -> None:
        self._directory = directory
        self._num_cpus = num_cpus
        self._ended = threading.Event()
        self._moved: Callable[[str], None] = lambda _dashboard: None
        self._thread = threading.Thread(target=self._watch, name="ray-head", daemon=True)
        self.adopted = False

    def __enter__(self) -> HeadKeeper:
        """Raises `WorkerError` when no head comes up."""
        self._head, self.adopted = ray_head.start_or_adopt(self._directory, num_cpus=self._num_cpus)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(ray_head.START_DEADLINE_S)
        ray_head.stop(self._head)

    @property
    def dashboard(self) -> str:
        return self._head.dashboard

    def on_move(self, moved: Callable[[str], None]) -> None:
        """Call `moved` with the new dashboard's URL, from a thread, after each start of a new head."""
        self._moved = moved

    def _watch(self) -> None:
        wait_s = EVERY_S
        while not self._ended.wait(wait_s):
            wait_s = EVERY_S
            if self._head.alive():
                continue
            log.warning("Ray's head (process %d) has died; starting another", self._head.pid)
            try:
                self._head, _ = ray_head.start_or_adopt(self._directory, num_cpus=self._num_cpus)
            except (WorkerError, OSError) as error:
                log.error("Ray's head does not start: %s", error)
                wait_s = RETRY_S
            else:
                self._moved(self._head.dashboard)
