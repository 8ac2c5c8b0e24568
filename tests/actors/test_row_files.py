"""Numbers by row lie beside a checkpoint's JSON, come back to the bit, and are vouched for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.checkpoint import CheckpointStore
from actors.row_files import RowFileStore
from modeseek_ray.errors import StorageError
from modeseek_ray.weights.row_values import RowValues

ROWS = 10_000


def saved(store: CheckpointStore) -> tuple[Path, dict[str, object]]:
    sums_R = np.random.default_rng(0).normal(size=ROWS)
    controller = {"gamma": 0.5, "ledger": RowValues().put(np.arange(ROWS), sums_R), "ledger_rows": ROWS}
    state = {"step": 5, "controller": controller}
    return store.finish(store.begin(5, 1), state), state


def test_rows_come_back_to_the_bit_and_are_no_digits(tmp_path: Path) -> None:
    store = RowFileStore(tmp_path)
    path, state = saved(store)
    assert store.latest() == path and store.read_controller(path) == state
    assert (path / "controller.json").stat().st_size < 1000
    assert (path / "ledger.npy").stat().st_size < 8 * ROWS + 1000
    assert "ledger.npy" in json.loads((path / "manifest.json").read_text())["files"]


def test_a_checkpoint_without_row_files_is_read_as_it_is(tmp_path: Path) -> None:
    path, state = saved(CheckpointStore(tmp_path))
    assert not (path / "ledger.npy").exists()
    assert RowFileStore(tmp_path).read_controller(path) == state


def test_a_damaged_row_file_is_passed_over(tmp_path: Path) -> None:
    store = RowFileStore(tmp_path)
    path, _ = saved(store)
    (path / "ledger.npy").write_bytes((path / "ledger.npy").read_bytes()[:-8])
    assert store.latest() is None
    with pytest.raises(StorageError, match=r"ledger\.npy cannot be read"):
        store.read_controller(path)
