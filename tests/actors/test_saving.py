"""Checkpoints sealed beside the next steps: the same ones, one at a time, and no failure passes unnoticed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint import CheckpointStore
from actors.http_sink import HttpSink
from actors.journal import ResultJournal
from actors.saving import Saver
from modeseek_ray.errors import StorageError


class Parts:
    """A trainer that writes one file, and a journal that notes what was committed."""

    def __init__(self) -> None:
        self.committed: list[int] = []
        self.weights = "start"

    async def save(self, directory: Path) -> None:
        (directory / "shard").write_text(self.weights)

    async def section(self, name: str, *, deadline_s: float) -> None: ...

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None:
        self.committed.append(step)

    async def forget(self, checkpoints: Sequence[Path]) -> None: ...


class SlowDisk(CheckpointStore):
    """Seals only when the test lets it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_seal = threading.Event()

    def finish(self, directory: Path, controller: Mapping[str, Any]) -> Path:
        assert self.may_seal.wait(30)
        return super().finish(directory, controller)


def _saver(store: CheckpointStore, parts: Any, *, background: bool) -> Saver:
    return Saver(store, parts, parts, 1, background=background)


async def test_training_goes_on_while_a_checkpoint_is_sealed(tmp_path: Path) -> None:
    store, parts = SlowDisk(tmp_path), Parts()
    saver = _saver(store, parts, background=True)
    state = {"step": 4, "cursor": {"position": 8}}
    await saver.save(state, {})
    state["step"], parts.weights = 5, "after step 5"  # the next step
    state["cursor"]["position"] = 10  # type: ignore[index]
    await saver.notice()
    assert (parts.committed, store.latest()) == ([], None)
    store.may_seal.set()
    await saver.settle()
    path = store.latest()
    assert path is not None and parts.committed == [4]
    assert store.read_controller(path) == {"step": 4, "cursor": {"position": 8}}
    assert (path / "shard").read_text() == "start"


async def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    store, parts = SlowDisk(tmp_path), Parts()
    saver = _saver(store, parts, background=True)
    await saver.save({"step": 4}, {})
    second = asyncio.create_task(saver.save({"step": 8}, {}, last=True))
    await asyncio.sleep(0.05)
    assert not (tmp_path / "step-8.a1.tmp").exists()
    store.may_seal.set()
    await second  # the last one is committed when it returns
    assert parts.committed == [4, 8]


@pytest.mark.parametrize("background", [False, True])
async def test_a_checkpoint_that_could_not_be_sealed_stops_the_attempt(
    tmp_path: Path, background: bool
) -> None:
    class Full(CheckpointStore):
        def finish(self, directory: Path, controller: Mapping[str, Any]) -> Path:
            raise StorageError("no space.", code="disk_full")

    saver = _saver(Full(tmp_path), Parts(), background=background)
    if not background:
        with pytest.raises(StorageError):
            await saver.save({"step": 4}, {})
        return
    await saver.save({"step": 4}, {})
    await asyncio.sleep(0.2)
    with pytest.raises(StorageError):
        await saver.notice()


@pytest.mark.parametrize("background", [False, True])
async def test_a_checkpoint_is_forgotten_by_the_store_before_its_files_go(
    tmp_path: Path, background: bool
) -> None:
    """At any moment all that is listed is there, whole."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)

    class Service:
        """Lists what it was told, and looks at each call whether all of it is there."""

        def __init__(self) -> None:
            self.listed: list[str] = []
            self.pruned: list[str] = []

        async def checkpoint(self, step: int, path: str, metrics: Any) -> None:
            self.listed.append(path)
            self.look()

        async def events(self, events: Any) -> int:
            return int(events[-1]["seq"])

        async def prune(self, path: str) -> None:
            self.look()
            self.listed.remove(path)
            self.pruned.append(Path(path).name)

        def look(self) -> None:
            for path in self.listed:
                store.verify(Path(path))

    service: Any = Service()
    sink = HttpSink(service, tmp_path / "spool.jsonl")
    parts: Any = Parts()
    saver = Saver(store, parts, ResultJournal(tmp_path / "results", sink), 1, background=background)
    for step in (2, 4, 6, 8):
        await saver.save({"step": step}, {}, last=step == 8)
    service.look()
    assert service.pruned == ["step-2.a1", "step-4.a1"]
    assert [path.name for path in store.all()] == ["step-8.a1", "step-6.a1"]


async def test_in_the_foreground_a_checkpoint_is_committed_on_return(tmp_path: Path) -> None:
    parts = Parts()
    await _saver(CheckpointStore(tmp_path), parts, background=False).save({"step": 4}, {})
    assert parts.committed == [4]


@pytest.mark.parametrize("background", [False, True])
async def test_a_pause_right_after_a_checkpoint_does_not_write_it_again(
    tmp_path: Path, background: bool
) -> None:
    """Moving the first aside for the second, a kill between the two renames would lose both."""
    store, parts = CheckpointStore(tmp_path), Parts()
    saver = _saver(store, parts, background=background)
    await saver.save({"step": 4}, {})
    parts.weights = "written twice"
    await saver.save({"step": 4}, {}, last=True)
    path = store.latest()
    assert parts.committed == [4] and path is not None and (path / "shard").read_text() == "start"
    await saver.save({"step": 5}, {}, last=True)
    assert parts.committed == [4, 5]
