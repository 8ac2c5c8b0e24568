"""Delivery of events: once, in order, through absences of the service; and the end of a lost lease."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import http_sink
from actors.http_sink import HttpSink, LeaseLost
from modeseek_ray.errors import ServiceError


class FlakyService:
    """Stores events by number, as the service does; fails the first `failures` calls of each kind."""

    def __init__(self, failures: int = 0, code: str = "unreachable", http_status: int = 503) -> None:
        self.stored: dict[int, Mapping[str, Any]] = {}
        self.checkpoints: list[int] = []
        self.pruned: list[str] = []
        self.history: list[str] = []
        self._left = {"events": failures, "checkpoint": failures, "transition": failures}
        self._error = (code, http_status)

    def _maybe_fail(self, kind: str) -> None:
        if self._left.get(kind, 0) > 0:
            self._left[kind] -= 1
            code, status = self._error
            raise ServiceError("away.", code=code, http_status=status)

    async def events(self, events: Sequence[Mapping[str, Any]]) -> int:
        self._maybe_fail("events")
        for event in events:
            self.stored.setdefault(event["seq"], event)
        self.history.append("events")
        return max(self.stored)

    async def checkpoint(self, step: int, path: str, metrics: Mapping[str, Any]) -> None:
        self._maybe_fail("checkpoint")
        self.checkpoints.append(step)
        self.history.append("checkpoint")

    async def prune(self, path: str) -> None:
        self.pruned.append(path)

    async def transition(self, to: str, **details: Any) -> None:
        self._maybe_fail("transition")
        self.history.append(to)

    async def heartbeat(self, progress: Mapping[str, Any]) -> str:
        return "cancel"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_sink, "RETRY_S", 0.0)
    monkeypatch.setattr(http_sink, "FLUSH_S", 0.01)
    monkeypatch.setattr(http_sink, "HEARTBEAT_S", 0.01)


def _sink(service: FlakyService, tmp_path: Path, **options: float) -> HttpSink:
    return HttpSink(service, tmp_path / "spool.jsonl", **options)  # type: ignore[arg-type]


def _emit(sink: HttpSink, count: int) -> None:
    for j in range(count):
        sink.emit({"type": "metrics", "level": "info", "message": f"{j}", "created_at": 0.0, "data": {}})


async def test_events_arrive_once_and_in_order_though_calls_fail(tmp_path: Path) -> None:
    service = FlakyService(failures=3)
    sink = _sink(service, tmp_path)
    _emit(sink, 5)
    await sink.transition("running")
    assert [service.stored[seq]["message"] for seq in sorted(service.stored)] == ["0", "1", "2", "3", "4"]
    assert service.history == ["events", "running"]
    assert len((tmp_path / "spool.jsonl").read_text().splitlines()) == 5


async def test_an_answer_that_was_lost_doubles_nothing(tmp_path: Path) -> None:
    class Forgetful(FlakyService):
        """Stores, and then its first answer is lost on the way."""

        async def events(self, events: Sequence[Mapping[str, Any]]) -> int:
            acknowledged = await super().events(events)
            self._left["events"] = 0
            if self.history.count("events") == 1:
                raise ServiceError("connection reset.", http_status=503)
            return acknowledged

    service = Forgetful()
    sink = _sink(service, tmp_path)
    _emit(sink, 3)
    await sink.transition("running")
    assert sorted(service.stored) == [1, 2, 3]


async def test_a_checkpoint_is_committed_after_the_events_before_it(tmp_path: Path) -> None:
    service = FlakyService()
    sink = _sink(service, tmp_path)
    kept, gone = tmp_path / "step-2.a1", tmp_path / "step-1.a1"
    kept.mkdir()
    _emit(sink, 1)
    await sink.checkpoint(1, gone, {})
    await sink.checkpoint(2, kept, {})
    assert service.history == ["events", "checkpoint", "checkpoint"]
    assert service.pruned == [str(gone)]


async def test_a_stale_fence_ends_the_attempt_at_once(tmp_path: Path) -> None:
    sink = _sink(FlakyService(failures=1, code="stale_fence", http_status=403), tmp_path)
    _emit(sink, 1)
    with pytest.raises(LeaseLost):
        await sink.transition("running")
    await sink.lost()


async def test_silence_ends_the_attempt_when_the_lease_has_run_out(tmp_path: Path) -> None:
    sink = _sink(FlakyService(failures=10**6), tmp_path, lease_s=0.0)
    _emit(sink, 1)
    with pytest.raises(LeaseLost):
        await sink.transition("running")


async def test_a_lease_is_counted_from_the_question_not_from_a_late_answer(tmp_path: Path) -> None:
    asked: list[float] = []
    answered = asyncio.Event()

    class Late(FlakyService):
        async def heartbeat(self, progress: Mapping[str, Any]) -> str:
            asked.append(time.monotonic())
            if len(asked) > 1:
                answered.set()
                await asyncio.sleep(3600)
            await asyncio.sleep(0.05)
            return "run"

    sink = _sink(Late(), tmp_path, lease_s=60.0)
    begun = sink._renewed
    sink.start()
    await asyncio.wait_for(answered.wait(), 60)
    assert begun < sink._renewed <= asked[0]
    await sink.close()


async def test_a_driver_stops_when_its_lease_is_over_though_the_service_only_hangs(tmp_path: Path) -> None:
    """A stopped service refuses nothing and answers nothing: the request is still under way."""

    class Hanging(FlakyService):
        async def heartbeat(self, progress: Mapping[str, Any]) -> str:
            await asyncio.sleep(3600)
            raise AssertionError("never answers")

    sink = _sink(Hanging(), tmp_path, lease_s=0.1)
    sink.start()
    await asyncio.wait_for(sink.lost(), 60)
    await sink.close()


async def test_a_spool_on_a_full_disk_loses_no_event(tmp_path: Path) -> None:
    service = FlakyService()
    sink = HttpSink(service, Path("/dev/full"))  # type: ignore[arg-type]
    _emit(sink, 3)
    await sink.transition("running")
    assert sorted(service.stored) == [1, 2, 3]
    await sink.close()


async def test_checkpoints_of_earlier_attempts_are_said_to_be_gone_when_they_are(tmp_path: Path) -> None:
    service = FlakyService()
    sink = _sink(service, tmp_path)
    old, new = tmp_path / "step-1.a1", tmp_path / "step-2.a2"
    new.mkdir()
    sink.know([old])
    await sink.checkpoint(2, new, {})
    assert service.pruned == [str(old)]


async def test_what_is_spooled_while_the_service_is_away_arrives_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FlakyService(failures=20)
    sink = _sink(service, tmp_path)
    sink.start()
    _emit(sink, 3)
    await asyncio.sleep(0.05)
    assert service.stored == {}
    assert len((tmp_path / "spool.jsonl").read_text().splitlines()) == 3  # on disk meanwhile
    for _ in range(200):
        await asyncio.sleep(0.02)
        if len(service.stored) == 3:
            break
    assert sorted(service.stored) == [1, 2, 3]
    await sink.close()


async def test_the_heartbeat_brings_what_the_user_wants(tmp_path: Path) -> None:
    sink = _sink(FlakyService(), tmp_path)
    assert sink.desired() == "run"
    sink.start()
    while sink.desired() == "run":
        await asyncio.sleep(0.005)
    assert sink.desired() == "cancel"
    await sink.close()


class Strict(FlakyService):
    """Reads bodies as the service does: one bad event, and the whole batch is refused."""

    async def events(self, events: Sequence[Mapping[str, Any]]) -> int:
        assert [event["seq"] for event in events] == list(range(len(self.stored) + 1, events[-1]["seq"] + 1))
        json.dumps(events, allow_nan=False).encode()
        if any("poison" in event["data"] for event in events):
            raise ServiceError("events.3.data: not that.", code="invalid_config", http_status=400)
        return await super().events(events)


async def test_a_figure_that_is_not_finite_is_null_and_a_book_is_cut(tmp_path: Path) -> None:
    service = Strict()
    sink = _sink(service, tmp_path)
    figures = {
        "loss": float("nan"),
        "grad": np.float32("inf"),
        "values": np.array([1.0, np.nan]),
        "at": tmp_path,
    }
    sink.emit({"type": "metrics", "message": "x" * 300_000, "created_at": 0.0, "data": figures})
    sink.emit({"type": "message", "message": "half a \ud83d", "created_at": 0.0, "data": {}})
    await sink.checkpoint(1, tmp_path, {})
    assert service.stored[1]["data"] == {
        "loss": None,
        "grad": None,
        "values": [1.0, None],
        "at": str(tmp_path),
    }
    assert (
        len(service.stored[1]["message"]) < 10_100
        and "290000 more characters" in service.stored[1]["message"]
    )
    assert service.stored[2]["message"] == "half a ?"
    assert [json.loads(line)["seq"] for line in (tmp_path / "spool.jsonl").open()] == [1, 2]


async def test_an_event_that_is_refused_is_replaced_by_a_warning_and_the_attempt_goes_on(
    tmp_path: Path,
) -> None:
    service = Strict()
    sink = _sink(service, tmp_path)
    _emit(sink, 3)
    sink.emit({"type": "metrics", "message": "bad", "created_at": 0.0, "data": {"poison": 1}})
    _emit(sink, 4)
    await sink.checkpoint(4, tmp_path, {})
    assert service.checkpoints == [4] and sorted(service.stored) == list(range(1, 9))
    replaced = service.stored[4]
    assert replaced["level"] == "warn" and "events.3.data: not that." in replaced["message"]
    assert [event["message"] for event in service.stored.values() if event is not replaced] == [
        *"012",
        *"0123",
    ]


async def test_a_service_that_refuses_everything_is_not_asked_for_ever(tmp_path: Path) -> None:
    sink = _sink(FlakyService(failures=10**6, code="invalid_config", http_status=400), tmp_path)
    _emit(sink, 2)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(sink.delivered(), 60)
