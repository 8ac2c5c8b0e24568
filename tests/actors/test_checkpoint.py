"""Checkpoints: complete or not there, verified, with something to fall back to."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.checkpoint import MANIFEST, CheckpointStore
from modeseek_ray.errors import StorageError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def save(store: CheckpointStore, step: int, attempt: int = 1, content: bytes = b"0123456789") -> Path:
    directory = store.begin(step, attempt)
    (directory / "zero").mkdir()
    (directory / "zero" / "shard.pt").write_bytes(content)
    return seal(store, directory, step=step)


def seal(store: CheckpointStore, directory: Path, **state: int) -> Path:
    """As `Saver` does, without a store that lists checkpoints."""
    finished = store.finish(directory, state)
    store.remove(store.surplus())
    return finished


def names(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.all()]


def test_a_finished_checkpoint_is_found_and_holds_the_drivers_state(store: CheckpointStore) -> None:
    assert store.latest() is None
    path = save(store, 5)
    assert path.name == "step-5.a1"
    assert store.latest() == path
    assert store.read_controller(path) == {"step": 5}
    manifest = json.loads((path / "manifest.json").read_text())
    # sha256 of the ten digits, as any other tool computes it
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert manifest["files"]["zero/shard.pt"] == {"bytes": 10, "sha256": digest}


def test_steps_and_attempts_are_compared_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=10)
    for step, attempt in [(9, 1), (10, 1), (10, 2), (2, 3)]:
        save(store, step, attempt)
    assert names(store) == ["step-10.a2", "step-10.a1", "step-9.a1", "step-2.a3"]


def test_what_was_never_finished_is_ignored_and_cleared_away(store: CheckpointStore) -> None:
    good = save(store, 1)
    torn = store.begin(2, 1)
    (torn / "shard.pt").write_bytes(b"half")
    assert store.latest() == good
    save(store, 3, attempt=2)
    assert not torn.exists()


def test_a_later_attempts_directory_is_left_alone(store: CheckpointStore) -> None:
    theirs = store.begin(4, attempt=2)
    store.begin(4, attempt=1)
    assert theirs.exists()


def flip_a_byte(path: Path) -> None:
    (path / "zero" / "shard.pt").write_bytes(b"0123456780")


def truncate(path: Path) -> None:
    (path / "zero" / "shard.pt").write_bytes(b"01234")


def lose_a_file(path: Path) -> None:
    (path / "zero" / "shard.pt").unlink()


def tear_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "fi')


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lose_a_file, tear_the_manifest, lose_the_manifest])
def test_a_damaged_newest_falls_back(store: CheckpointStore, damage: Callable[[Path], None]) -> None:
    older, newest = save(store, 1), save(store, 2)
    damage(newest)
    with pytest.raises(StorageError, match="damaged"):
        store.verify(newest)
    assert store.latest() == older


def test_at_least_two_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2, 3):
        save(store, step)
    assert names(store) == ["step-3.a1", "step-2.a1"]


@pytest.mark.parametrize("crash_at", range(1, 4))
def test_a_crash_while_finishing_loses_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Finishing the third step renames twice: itself, and the first out of the way. Crash at each, or at fsync."""
    save(store, 1)
    save(store, 2)
    directory = store.begin(3, 1)
    (directory / "shard.pt").write_bytes(b"x")
    calls = 0
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise KeyboardInterrupt
        real(source, target)

    def fsync(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if crash_at == 3:
            patch.setattr(os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            seal(store, directory)
    latest = store.latest()
    assert latest is not None
    assert latest.name == ("step-3.a1" if crash_at == 2 else "step-2.a1")
    assert len(names(store)) >= 2


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    save(store, 1)
    path = save(store, 1, content=b"later")
    assert (path / "zero" / "shard.pt").read_bytes() == b"later"
    assert names(store) == ["step-1.a1"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-1.a1"]


def test_a_full_disk_is_refused_with_figures(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(store, 1)
    needed = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, needed - 1))
    with pytest.raises(StorageError, match=f"needs {needed:,} bytes, {needed - 1:,} are free"):
        store.begin(2, 1)
    assert store.latest() == path


def test_the_first_checkpoint_is_checked_against_what_is_expected(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, expected_bytes=2**62)
    with pytest.raises(StorageError, match="are free"):
        store.begin(1, 1)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        CheckpointStore(tmp_path / "file" / "checkpoints").begin(1, 1)
    assert caught.value.file == str(tmp_path / "file" / "checkpoints")


def test_what_history_does_not_know_is_gone_back_behind(store: CheckpointStore) -> None:
    """A crash between rename and commit: the newest on disk was never committed."""
    committed = save(store, 5)
    save(store, 10)
    store.forget_uncommitted(committed)
    assert names(store) == ["step-5.a1"]
    store.forget_uncommitted(None)
    assert names(store) == []


def test_a_checkpoint_says_what_it_was_written_by_and_a_change_is_told(tmp_path: Path) -> None:
    mine = {"versions": {"torch": "2.8.0", "deepspeed": "0.17"}, "config_sha256": "ab"}
    store = CheckpointStore(tmp_path, origin=mine)
    directory = store.finish(store.begin(4, 1), {"step": 4})
    assert json.loads((directory / MANIFEST).read_text())["origin"] == mine
    assert store.differences(directory) == []
    newer = {"versions": {**mine["versions"], "torch": "2.9.0"}, "config_sha256": "cd"}  # type: ignore[dict-item]
    [version, config] = CheckpointStore(tmp_path, origin=newer).differences(directory)
    assert "torch 2.8.0, now it is 2.9.0" in version and "another configuration" in config
    old = CheckpointStore(tmp_path / "old")
    assert CheckpointStore(tmp_path / "old", origin=newer).differences(old.finish(old.begin(1, 1), {})) == []
