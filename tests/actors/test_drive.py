"""When the driver's process ends its work from outside, rather than waiting for the loop to look."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors import http_sink
from actors.commands import drive
from modeseek_ray.errors import ServiceError
from modeseek_ray.jobs.paths import Home


class Wish:
    """What `_stopped` reads of a sink."""

    def __init__(self, desired: str, section: str | None) -> None:
        self._desired = desired
        self.section = section

    def desired(self) -> str:
        return self._desired


async def _ending(desired: str, section: str | None) -> str | None:
    """The state to end in, or None where the loop is left to end by itself."""
    sink: Any = Wish(desired, section)
    try:
        return await asyncio.wait_for(drive._stopped(sink), 0.5)
    except TimeoutError:
        return None


@pytest.mark.parametrize(
    ("desired", "section", "state"),
    [
        ("run", "score", None),
        ("pause", None, "paused"),
        ("pause", "score", "paused"),  # nothing is trained yet: scoring may take hours
        ("pause", "setup", "paused"),
        ("pause", "step", None),  # the loop saves a checkpoint first
        ("pause", "checkpoint", None),
        ("cancel", "step", "cancelled"),
    ],
)
async def test_a_pause_is_left_to_the_loop_once_there_is_something_to_save(
    monkeypatch: pytest.MonkeyPatch, desired: str, section: str | None, state: str | None
) -> None:
    monkeypatch.setattr(drive, "CANCEL_GRACE_S", 0.0)
    assert await _ending(desired, section) == state


async def test_a_driver_whose_lease_is_lost_ends_its_work_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another attempt may be running: it neither goes on nor reports a failure."""
    ended, said = asyncio.Event(), []

    class Away:
        """A service that never answers."""

        async def heartbeat(self, progress: Any) -> str:
            raise ServiceError("away.", code="unreachable", http_status=503)

        async def transition(self, to: str, **_: Any) -> None:
            said.append(to)

    async def work(*_: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(http_sink, "LEASE_S", 0.1)
    monkeypatch.setattr(http_sink, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(drive, "_work", work)
    home = Home(tmp_path)
    home.attempt("ftjob-1", 1).mkdir(parents=True)
    client: Any = Away()
    assert await asyncio.wait_for(drive._drive(client, home, "ftjob-1", 1), 10) == 1
    assert (ended.is_set(), said) == (True, [])
