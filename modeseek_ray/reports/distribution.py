"""The ledger boiled down: how weights were spread at each step, and what each row got in all.

Streams over the ledger's pieces, so its size does not matter. Replay rows are left out: their rows
are another file's, and they are not weighted.

    S steps    Q quantiles    B bins    R rows of the training file that were used
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeseek_ray.reports.ledger import iter_steps, ledger_columns, read_weights
from modeseek_ray.types import FloatArray, IntArray

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Weights are compared by ratio: bins are equal in log2 v; what is outside falls into the end bins.
BIN_EDGES = np.linspace(-7.0, 4.0, 45)
STARVED = 0.1  # cumulative weight below which a row has hardly been learnt from (METHODS.md section 2)
DOMINANT = 5.0  # times the average row's cumulative weight


@dataclass(frozen=True)
class WeightCourse:
    """How the weights of a batch were spread, step by step."""

    step_S: IntArray
    quantiles_SQ: FloatArray  # at QUANTILES
    counts_SB: IntArray  # samples by log2 v, in BIN_EDGES


@dataclass(frozen=True)
class RowLedger:
    """What each row got over the whole job. `first` and `last` are its weights at its first and last use."""

    row_R: IntArray
    uses_R: IntArray
    cumulative_R: FloatArray
    first_R: FloatArray
    last_R: FloatArray
    log_ratio_R: FloatArray  # (log pi_theta - log pi_0) / T at the last use; NaN where not measured
    reward_R: FloatArray  # at the last use; NaN where there is none
    tokens_R: IntArray  # trained tokens, over all uses

    def __len__(self) -> int:
        return len(self.row_R)

    @property
    def mean_R(self) -> FloatArray:
        return self.cumulative_R / self.uses_R

    @property
    def starved_R(self) -> IntArray:
        """Indices of rows whose weights add up to less than STARVED."""
        return np.flatnonzero(self.cumulative_R < STARVED)

    @property
    def dominant_R(self) -> IntArray:
        """Indices of rows that got more than DOMINANT times the average row's weight."""
        return (
            np.flatnonzero(self.cumulative_R > DOMINANT * self.cumulative_R.mean())
            if len(self)
            else self.row_R
        )

    def most(self, count: int) -> IntArray:
        """Indices of the rows with the largest mean weight, largest first; ties by row."""
        return np.lexsort((self.row_R, -self.mean_R))[:count]

    def least(self, count: int) -> IntArray:
        return np.lexsort((self.row_R, self.mean_R))[:count]


def read_distribution(directory: Path) -> tuple[WeightCourse, RowLedger]:
    """Both views of a result directory's ledger; empty ones if it has none yet."""
    return distribution(read_weights(directory))


def distribution(tables: Iterable[pa.Table]) -> tuple[WeightCourse, RowLedger]:
    """Both views of ledger pieces, oldest first, each step whole within its piece."""
    steps: list[int] = []
    quantiles: list[FloatArray] = []
    counts: list[IntArray] = []
    rows = _RowSums()
    for table in tables:
        columns = ledger_columns(table)
        is_new_N = ~columns["is_replay"]
        columns = {name: values[is_new_N] for name, values in columns.items()}
        for step, part in iter_steps(columns["step"]):
            weights_N = columns["weight"][part]
            steps.append(step)
            quantiles.append(np.quantile(weights_N, QUANTILES))
            counts.append(_histogram(weights_N))
        rows.add(columns)
    course = WeightCourse(
        step_S=np.array(steps, dtype=np.int64),
        quantiles_SQ=np.array(quantiles).reshape(-1, len(QUANTILES)),
        counts_SB=np.array(counts, dtype=np.int64).reshape(-1, len(BIN_EDGES) - 1),
    )
    return course, rows.ledger()


def _histogram(weights_N: FloatArray) -> IntArray:
    with np.errstate(divide="ignore"):
        log_N = np.clip(np.log2(np.maximum(weights_N, 0.0)), BIN_EDGES[0], BIN_EDGES[-1])
    return np.histogram(log_N, bins=BIN_EDGES)[0]


class _RowSums:
    """Sums by row id; the arrays grow with the largest id seen."""

    def __init__(self) -> None:
        self._sums = {
            name: np.zeros(0) for name in ("uses", "cumulative", "first", "last", "ratio", "reward", "tokens")
        }

    def add(self, columns: dict[str, FloatArray]) -> None:
        known_N = columns["row"] >= 0
        row_N = columns["row"][known_N]
        if len(row_N) == 0:
            return
        self._grow(int(row_N.max()) + 1)
        sums = self._sums
        weight_N = columns["weight"][known_N]
        per_token_N = (columns["log_policy"] - columns["log_reference"]) / np.maximum(
            columns["num_tokens"], 1
        )
        rows, first_at = np.unique(row_N, return_index=True)
        last_at = len(row_N) - 1 - np.unique(row_N[::-1], return_index=True)[1]
        new = sums["uses"][rows] == 0
        sums["first"][rows[new]] = weight_N[first_at[new]]
        sums["last"][rows] = weight_N[last_at]
        sums["ratio"][rows] = per_token_N[known_N][last_at]
        sums["reward"][rows] = columns["reward"][known_N][last_at]
        sums["uses"] += np.bincount(row_N, minlength=len(sums["uses"]))
        sums["cumulative"] += np.bincount(row_N, weights=weight_N, minlength=len(sums["uses"]))
        tokens_N = np.nan_to_num(columns["num_tokens"][known_N])
        sums["tokens"] += np.bincount(row_N, weights=tokens_N, minlength=len(sums["uses"]))

    def _grow(self, size: int) -> None:
        missing = size - len(self._sums["uses"])
        if missing > 0:
            self._sums = {name: np.pad(values, (0, missing)) for name, values in self._sums.items()}

    def ledger(self) -> RowLedger:
        row_R = np.flatnonzero(self._sums["uses"] > 0)
        used = {name: values[row_R] for name, values in self._sums.items()}
        return RowLedger(
            row_R=row_R,
            uses_R=used["uses"].astype(np.int64),
            cumulative_R=used["cumulative"],
            first_R=used["first"],
            last_R=used["last"],
            log_ratio_R=used["ratio"],
            reward_R=used["reward"],
            tokens_R=used["tokens"].astype(np.int64),
        )
