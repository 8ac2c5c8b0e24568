"""Streams of a job share a look at the store, and miss nothing by it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.jobs.event_store import News
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import EventDraft
from modeseek_ray.jobs.store import Store
from modeseek_ray.service import bulletin
from modeseek_ray.service.bulletin import Bulletins
from modeseek_ray.service.notify import Notifier

JOB = "ftjob-one"


class Desk:
    """Bulletins over a store whose looks are counted, and may be held up once they have looked."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.notifier = Notifier()
        store.database.listeners.append(self.notifier.notify)
        self.bulletins = Bulletins(store.events, self.notifier)
        self.looks: list[int] = []  # after which event
        self.go_on = threading.Event()
        self.go_on.set()
        self._news = store.events.news

    def news(self, job_id: str, sequence: int, limit: int) -> News:
        self.looks.append(sequence)
        found = self._news(job_id, sequence, limit)
        self.go_on.wait(30)
        return found

    async def looked(self, times: int) -> None:
        async with asyncio.timeout(30):
            while len(self.looks) < times:
                await asyncio.sleep(0.01)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    home = Home(tmp_path / "home")
    home.prepare()
    store = Store(home.store_url)
    store.jobs.submit(JOB, {"model": "m", "training_file": "file-1"})
    desk = Desk(store)
    monkeypatch.setattr(store.events, "news", desk.news)
    yield desk
    store.close()


async def test_streams_that_are_equally_far_share_a_look(desk: Desk) -> None:
    with ExitStack() as listeners:
        for _ in range(10):
            listeners.enter_context(desk.notifier.listen(JOB))
        told = await asyncio.gather(*(desk.bulletins.after(JOB, 0) for _ in range(10)))
        assert desk.looks == [0]
        assert {b.sequence for b in told} == {1} and told[0].text.count(b"\n\n") == 1
        behind, level = await asyncio.gather(desk.bulletins.after(JOB, 0), desk.bulletins.after(JOB, 1))
        assert (behind.text, level.text, sorted(desk.looks)) == (told[0].text, b"", [0, 0, 1])


async def test_a_look_that_began_before_a_change_is_not_shared_by_whom_it_woke(desk: Desk) -> None:
    """Else the second, whose event was cleared, would wait for the next change with this one untold."""
    with desk.notifier.listen(JOB), desk.notifier.listen(JOB) as changed:
        desk.go_on.clear()
        early = asyncio.create_task(desk.bulletins.after(JOB, 1))
        await desk.looked(1)
        desk.store.events.add(JOB, EventDraft("news"))
        await changed.wait()
        changed.clear()
        late = asyncio.create_task(desk.bulletins.after(JOB, 1))
        await desk.looked(2)
        desk.go_on.set()
        assert (await early).text == b"" and b"news" in (await late).text


async def test_a_stream_that_is_cut_takes_nothing_from_the_others(desk: Desk) -> None:
    with desk.notifier.listen(JOB):
        desk.go_on.clear()
        first = asyncio.create_task(desk.bulletins.after(JOB, 0))
        second = asyncio.create_task(desk.bulletins.after(JOB, 0))
        await desk.looked(1)
        first.cancel()
        desk.go_on.set()
        assert (await second).sequence == 1
        assert first.cancelled() or isinstance(first.exception(), asyncio.CancelledError)


async def test_a_look_that_fails_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> News:
        raise OSError("no space left on device")

    with desk.notifier.listen(JOB):
        with monkeypatch.context() as broken:
            broken.setattr(desk.store.events, "news", full)
            answers = [desk.bulletins.after(JOB, 0) for _ in range(2)]
            told = await asyncio.gather(*answers, return_exceptions=True)
            assert [type(error) for error in told] == [OSError, OSError]
        assert (await desk.bulletins.after(JOB, 0)).sequence == 1


async def test_a_long_history_comes_in_parts_and_ends_with_the_job(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulletin, "_BATCH", 2)
    desk.store.jobs.cancel(JOB)  # accepted, cancelling, cancelled
    with desk.notifier.listen(JOB):
        first = await desk.bulletins.after(JOB, 0)
        assert (first.sequence, first.is_full, first.is_over) == (2, True, False)
        last = await desk.bulletins.after(JOB, 2)
        assert (last.sequence, last.is_full, last.is_over) == (3, False, True)
