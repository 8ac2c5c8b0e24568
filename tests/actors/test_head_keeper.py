"""A head that has died is started again, and who talks to it is told where; one that lives is left alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from actors import head_keeper, ray_head
from actors.head_keeper import HeadKeeper
from modeseek_ray.errors import WorkerError


class Head:
    """A head that lives until the test says otherwise."""

    def __init__(self, number: int) -> None:
        self.pid = number
        self.dashboard = f"http://127.0.0.1:{number}"
        self.lives = True

    def alive(self) -> bool:
        return self.lives


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All heads that were started. The second start fails, as with a port that was just taken."""
    started: list[Any] = []
    starts = 0

    def start(_directory: Path, *, num_cpus: int) -> tuple[Any, bool]:
        nonlocal starts
        starts += 1
        if starts == 2:
            raise WorkerError("Ray's head did not start.", code="ray_head")
        started.append(Head(len(started) + 1))
        return started[-1], False

    def stop(head: Any) -> None:
        head.lives = False

    monkeypatch.setattr(ray_head, "start_or_adopt", start)
    monkeypatch.setattr(ray_head, "stop", stop)
    monkeypatch.setattr(head_keeper, "EVERY_S", 0.01)
    monkeypatch.setattr(head_keeper, "RETRY_S", 0.02)
    return started


def test_a_dead_head_is_replaced_until_the_service_ends(heads: list[Any], tmp_path: Path) -> None:
    moved, told = threading.Event(), []
    with HeadKeeper(tmp_path, num_cpus=2) as keeper:
        keeper.on_move(lambda dashboard: (told.append(dashboard), moved.set()))  # type: ignore[func-returns-value]
        assert keeper.dashboard == "http://127.0.0.1:1"
        assert not moved.wait(0.1) and len(heads) == 1
        heads[0].lives = False
        assert moved.wait(60)
        assert (told, keeper.dashboard) == (["http://127.0.0.1:2"], "http://127.0.0.1:2")
    assert not heads[-1].lives and len(heads) == 2
