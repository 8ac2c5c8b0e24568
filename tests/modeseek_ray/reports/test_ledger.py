"""The per-sample ledger: segments, merging, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeseek_ray.errors import StorageError
from modeseek_ray.reports.ledger import WeightsWriter, ledger_columns, read_weights
from modeseek_ray.types import Group, Handle, Weights


def group(*rows: int, **columns: Any) -> Group:
    n = len(rows)
    return Group(
        prompt=rows[0],
        row_N=np.array(rows),
        num_tokens_N=np.full(n, 3),
        length_N=np.full(n, 5),
        payload=Handle(block=[], index_N=np.arange(n)),
        **columns,
    )


def weights(*values: float) -> Weights:
    return Weights(np.array(values), gamma=None, beta=None, ess_ratio=1.0, bound_by="none")


def write(writer: WeightsWriter, *steps: int, scale: float = 1.0) -> None:
    for step in steps:
        writer.append(step, [group(2 * step), group(2 * step + 1)], weights(0.5 * scale, 1.5 * scale))


def steps_read(directory: Path) -> list[int]:
    return [step for table in read_weights(directory) for step in table["step"].to_pylist()]


def test_round_trip_and_nulls(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path)
    samples = group(
        7,
        9,
        log_policy_N=np.array([-1.5, -2.5]),
        rewards_N=np.array([np.nan, 1.0]),
        is_replay_N=np.array([False, True]),
    )
    writer.append(1, [samples], weights(0.25, 1.75))
    path = writer.close()
    assert path.name == "weights.parquet"
    assert not (tmp_path / "weights").exists()
    (table,) = read_weights(tmp_path)
    assert table["reward"].to_pylist() == [None, 1.0]
    assert table["log_reference"].to_pylist() == [None, None]
    columns = ledger_columns(table)
    assert columns["weight"].tolist() == [0.25, 1.75]
    assert columns["is_replay"].tolist() == [False, True]
    assert np.isnan(columns["reward"][0])
    assert columns["num_tokens"].tolist() == [3.0, 3.0]


def test_what_was_flushed_can_be_read_before_the_end(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path, steps_per_segment=2)
    write(writer, 1, 2, 3)
    assert steps_read(tmp_path) == [1, 1, 2, 2]
    writer.flush()
    assert steps_read(tmp_path) == [1, 1, 2, 2, 3, 3]
    assert len(list((tmp_path / "weights").iterdir())) == 2


def test_resuming_inside_a_segment_keeps_its_earlier_steps(tmp_path: Path) -> None:
    write(writer := WeightsWriter(tmp_path, steps_per_segment=3), 1, 2, 3, 4, 5)
    writer.flush()
    resumed = WeightsWriter(tmp_path, steps_per_segment=3)
    resumed.truncate_after(2)
    write(resumed, 3, 4, scale=2.0)
    resumed.close()
    weight_at = {
        step: weight
        for table in read_weights(tmp_path)
        for step, weight in zip(table["step"].to_pylist(), table["weight"].to_pylist(), strict=True)
    }
    assert weight_at == {1: 1.5, 2: 1.5, 3: 3.0, 4: 3.0}


def test_a_kill_between_merging_and_cleaning_up_counts_nothing_twice(tmp_path: Path) -> None:
    write(writer := WeightsWriter(tmp_path, steps_per_segment=1), 1, 2, 3)
    left_over = {p.name: p.read_bytes() for p in (tmp_path / "weights").iterdir()}
    writer.close()
    (tmp_path / "weights").mkdir()
    for name, data in left_over.items():
        (tmp_path / "weights" / name).write_bytes(data)
    assert steps_read(tmp_path) == [1, 1, 2, 2, 3, 3]
    resumed = WeightsWriter(tmp_path)
    resumed.truncate_after(2)
    write(resumed, 3)
    resumed.close()
    assert steps_read(tmp_path) == [1, 1, 2, 2, 3, 3]


def test_a_step_is_written_once(tmp_path: Path) -> None:
    write(WeightsWriter(tmp_path, steps_per_segment=1), 4)
    with pytest.raises(StorageError, match="step 4 is already in the ledger"):
        write(WeightsWriter(tmp_path), 4)


def test_merging_nothing_is_an_empty_ledger(tmp_path: Path) -> None:
    WeightsWriter(tmp_path).close()
    assert steps_read(tmp_path) == []
    write(writer := WeightsWriter(tmp_path), 1)
    writer.close()
    assert steps_read(tmp_path) == [1, 1]
