"""When the driver's process ends its work from outside, rather than waiting for the loop to look."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import http_sink
from actors.commands import drive
from modeseek_ray.errors import ServiceError, StorageError, WorkerError
from modeseek_ray.jobs.paths import Home

TOLD: dict[str, Any] = {"lease_s": 60.0, "deadlines_s": {}}  # by the secret file


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

    monkeypatch.setattr(http_sink, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(drive, "_work", work)
    home = Home(tmp_path)
    home.attempt("ftjob-1", 1).mkdir(parents=True)
    client: Any = Away()
    assert await asyncio.wait_for(drive._drive(client, home, "ftjob-1", 1, {**TOLD, "lease_s": 0.1}), 10) == 1
    assert (ended.is_set(), said) == (True, [])


class Listening:
    """A service that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.messages: list[str] = []

    async def heartbeat(self, progress: Any) -> str:
        return "run"

    async def events(self, events: Any) -> int:
        self.messages += [event["message"] for event in events]
        return int(events[-1]["seq"])

    async def transition(self, to: str, **_: Any) -> None:
        self.said.append(to)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (WorkerError("rank 1 died.", code="worker_died"), 1, []),  # a new attempt may do better
        (WorkerError("rank 1 raised ValueError."), 0, ["failed"]),
        (OSError(errno.ENOSPC, "No space left on device"), 0, ["paused"]),  # goes on when there is space
        (StorageError("no room for a checkpoint.", code="disk_full"), 0, ["paused"]),
        (StorageError("the checkpoint is damaged."), 0, ["failed"]),
    ],
)
async def test_a_worker_that_died_ends_the_attempt_and_not_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, status: int, said: list[str]
) -> None:
    async def work(*_: Any) -> None:
        raise error

    monkeypatch.setattr(drive, "_work", work)
    home, service = Home(tmp_path), Listening()
    home.attempt("ftjob-1", 1).mkdir(parents=True)
    client: Any = service
    assert await drive._drive(client, home, "ftjob-1", 1, TOLD) == status
    assert service.said == said
    assert bool(service.messages) == (status == 1)


async def test_an_attempt_that_had_nothing_left_to_train_says_that_it_runs_before_it_succeeds(
    tmp_path: Path,
) -> None:
    """Killed in the export, resumed at the last step: the state table has no way from starting to succeeded."""
    service: Any = Listening()
    sink = http_sink.HttpSink(service, tmp_path / "spool.jsonl")
    outcome = SimpleNamespace(ended="run", state=SimpleNamespace(trained_tokens=1))
    result: Any = SimpleNamespace(outcome=outcome, model_path=Path("/m"), result_files=[], picked={})
    await drive._conclude(sink, result)
    assert service.said == ["running", "succeeded"]
