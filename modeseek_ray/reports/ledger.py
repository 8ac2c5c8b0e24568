"""`weights.parquet`: how much every sample counted at every step.

While the job runs, the rows lie in segments `weights/part-<first step>-<last step>.parquet`, each
written under another name first, so a kill loses at most the steps not yet flushed; flush before a
checkpoint is committed and a resumed job misses nothing. `close` merges them into one file.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from modeseek_ray.errors import StorageError
from modeseek_ray.types import Evidence, Group, IntArray, Weights

WEIGHTS_FILE = "weights.parquet"
SEGMENTS = "weights"
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("log_policy", pa.float64()),  # nats, summed over the sample's trained tokens
        pa.field("log_reference", pa.float64()),
        pa.field("num_tokens", pa.int64()),
        pa.field("reward", pa.float64()),
        pa.field("is_replay", pa.bool_()),
    ]
)


class WeightsWriter:
    """Collects the samples of some steps and writes them as one segment."""

    def __init__(self, directory: Path, *, steps_per_segment: int = 64) -> None:
        self.directory = directory
        self.steps_per_segment = steps_per_segment
        self._tables: list[pa.Table] = []
        self._steps: list[int] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._reopen()
        self._last_step = _last_step(directory)

    def append(self, step: int, groups: Sequence[Group], weights: Weights) -> None:
        """The samples of one step, in the order of the groups. What is not known (None, NaN) is null."""
        if step <= self._last_step:
            raise StorageError(
                f"step {step} is already in the ledger.",
                file=str(self.directory / SEGMENTS),
                mend="Call truncate_after with the checkpoint's step before writing again.",
            )
        evidence = Evidence.of(groups)
        columns = {
            "step": np.full(evidence.size, step, dtype=np.int64),
            "row": _column(evidence.row_N, evidence.size, pa.int64()),
            "weight": _column(weights.values_N, evidence.size, pa.float64()),
            "log_policy": _column(evidence.log_policy_N, evidence.size, pa.float64()),
            "log_reference": _column(evidence.log_reference_N, evidence.size, pa.float64()),
            "num_tokens": _column(evidence.num_tokens_N, evidence.size, pa.int64()),
            "reward": _column(evidence.rewards_N, evidence.size, pa.float64()),
            "is_replay": _column(evidence.is_replay_N, evidence.size, pa.bool_()),
        }
        self._tables.append(pa.table(columns, schema=SCHEMA))
        self._steps.append(step)
        self._last_step = step
        if len(self._steps) >= self.steps_per_segment:
            self.flush()

    def flush(self) -> None:
        """Put what is collected on disk. Await before a checkpoint of these steps is committed."""
        if not self._tables:
            return
        path = self.directory / SEGMENTS / f"part-{self._steps[0]:09d}-{self._steps[-1]:09d}.parquet"
        _write_table(path, pa.concat_tables(self._tables))
        self._tables, self._steps = [], []

    def truncate_after(self, step: int) -> None:
        """Forget the samples of later steps: the job resumes from that checkpoint."""
        self.flush()
        for path in _segments(self.directory):
            first, last = _segment_steps(path)
            if last <= step:
                continue
            if first <= step:
                table = pq.read_table(path)
                kept = table.filter(pc.less_equal(table["step"], step))
                _write_table(path.with_name(f"part-{first:09d}-{step:09d}.parquet"), kept)
            path.unlink()
        self._last_step = _last_step(self.directory)

    def close(self) -> Path:
        """Merge the segments into `weights.parquet`, one row group each, and remove them."""
        self.flush()
        path = self.directory / WEIGHTS_FILE
        temporary = path.with_name(f".{WEIGHTS_FILE}.tmp")
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for segment in _segments(self.directory):
                for table in _row_groups(segment):
                    writer.write_table(table, row_group_size=max(len(table), 1))
        _sync_and_rename(temporary, path)
        shutil.rmtree(self.directory / SEGMENTS, ignore_errors=True)
        return path

    def _reopen(self) -> None:
        """A merged file is complete, so segments beside it are left-overs; it becomes the first one."""
        merged = self.directory / WEIGHTS_FILE
        folder = self.directory / SEGMENTS
        if not merged.exists():
            folder.mkdir(exist_ok=True)
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        steps = pq.read_table(merged, columns=["step"])["step"]
        if len(steps) == 0:
            merged.unlink()
            return
        bounds = pc.min_max(steps)
        merged.replace(folder / f"part-{bounds['min'].as_py():09d}-{bounds['max'].as_py():09d}.parquet")


def read_weights(directory: Path) -> Iterator[pa.Table]:
    """The ledger in pieces, whole steps in each, oldest first; of a running job, what was flushed.

    Never holds more than one segment: a long job's ledger may not fit in memory.
    """
    merged = directory / WEIGHTS_FILE
    for path in [merged] if merged.exists() else _segments(directory):
        yield from _row_groups(path)


def _row_groups(path: Path) -> Iterator[pa.Table]:
    file = pq.ParquetFile(path)
    for index in range(file.num_row_groups):
        yield file.read_row_group(index)


def _column(values: ArrayLike | None, n: int, type_: pa.DataType) -> pa.Array:
    if values is None:
        return pa.nulls(n, type_)
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return pa.array(array, mask=np.isnan(array)).cast(type_)
    return pa.array(array).cast(type_)


def _segments(directory: Path) -> list[Path]:
    return sorted((directory / SEGMENTS).glob("part-*.parquet"))


def _last_step(directory: Path) -> int:
    segments = _segments(directory)
    return _segment_steps(segments[-1])[1] if segments else -1


def _segment_steps(path: Path) -> tuple[int, int]:
    _, first, last = path.stem.split("-")
    return int(first), int(last)


def _write_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd", row_group_size=max(len(table), 1))
    _sync_and_rename(temporary, path)


def _sync_and_rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def ledger_columns(table: pa.Table) -> dict[str, Any]:
    """Columns as numpy: floats with NaN for null, `is_replay` with False for null."""
    out: dict[str, Any] = {name: table[name].to_numpy() for name in ("step", "row", "weight")}
    for name in ("log_policy", "log_reference", "num_tokens", "reward"):
        out[name] = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    out["is_replay"] = pc.fill_null(table["is_replay"], False).to_numpy(zero_copy_only=False)
    return out


def iter_steps(steps_N: IntArray) -> Iterator[tuple[int, slice]]:
    """(step, rows) of a column in which equal steps are neighbours.

    >>> list(iter_steps(np.array([3, 3, 4])))
    [(3, slice(0, 2, None)), (4, slice(2, 3, None))]
    """
    bounds = np.flatnonzero(np.diff(steps_N)) + 1
    edges = [0, *bounds.tolist(), len(steps_N)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            yield int(steps_N[start]), slice(start, end)
