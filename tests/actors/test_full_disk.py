"""A full disk under checkpoints: a small tmpfs where mounting is allowed, a limit on file sizes where it is not."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from actors.checkpoint import CheckpointStore
from modeseek_ray.errors import StorageError, is_full

ROOM = 1 << 20  # bytes
FULL = "No space left|File too large"


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for one MiB, or for files of one MiB."""
    directory = tmp_path / "volume"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield directory
        finally:
            subprocess.run(["umount", "-l", str(directory)], check=True)
        return
    with file_size_limit(ROOM):
        yield directory


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writing more than this into one file fails; Python ignores the signal that would come with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_without_room_leaves_the_one_before_and_fits_when_there_is_room(
    small_volume: Path,
) -> None:
    store = CheckpointStore(small_volume / "checkpoints")
    first = store.begin(4, 1)
    (first / "shard").write_bytes(bytes(400_000))
    kept = store.finish(first, {"step": 4})
    second = store.begin(8, 1)
    with pytest.raises(OSError, match=FULL) as failed:
        (second / "shard").write_bytes(bytes(2 * ROOM))
    assert is_full(failed.value)
    assert store.latest() == kept
    again = store.begin(8, 2)  # the next attempt: what is half is cleared away
    (again / "shard").write_bytes(bytes(400_000))
    assert store.latest() == kept
    assert store.finish(again, {"step": 8}) == store.latest()


def test_a_checkpoint_that_will_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, expected_bytes=2**60)
    with pytest.raises(StorageError, match="needs .* bytes") as refused:
        store.begin(1, 1)
    assert refused.value.code == "disk_full" and is_full(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_says_that_the_disk_is_full_and_not_that_a_position_is_unexpected(small_volume: Path) -> None:
    import torch

    from actors.engine import _TensorsOnly

    state = {"weights": torch.from_numpy(np.zeros(2 * ROOM, dtype=np.uint8))}
    with pytest.raises(OSError, match=FULL) as failed:
        _TensorsOnly().save(state, str(small_volume / "shard.pt"))
    assert is_full(failed.value)
    state = {"weights": torch.ones(8)}
    _TensorsOnly().save(state, str(small_volume / "shard.pt"))
    assert torch.equal(_TensorsOnly().load(str(small_volume / "shard.pt"))["weights"], torch.ones(8))


def test_other_errors_are_not_taken_for_a_full_disk() -> None:
    assert not is_full(PermissionError(13, "Permission denied"))
    assert not is_full(StorageError("the checkpoint is damaged."))


def test_a_full_disk_is_recognised_behind_the_error_that_it_caused() -> None:
    with pytest.raises(StorageError) as failed:
        raise StorageError("cannot be written.") from OSError(28, "No space left on device")
    assert is_full(failed.value)
