"""When the driver's process ends its work from outside, rather than waiting for the loop to look."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.commands import drive


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
