"""Evidence, checked: float64 columns of the rows that are weighted, and the log ratio the user chose.

N  all rows of the global batch      A  active rows: new (not replay) and, with rewards, rewarded
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modeseek_ray.errors import ConfigError, NumericsError
from modeseek_ray.types import BoolArray, Evidence, FloatArray, IntArray
from modeseek_ray.weights.weighting import NEED_OF_COLUMN, Weighting, needs

_COLUMN_OF_NEED = {need: column for column, need in NEED_OF_COLUMN.items()}
_WAY_OUT = {
    "policy": "Score the batch with the policy first.",
    "initial": "Score the batch with the frozen start first.",
    "behavior": "Give the sampler's log-probabilities with the data, or name a behavior_model.",
    "rewards": "Add a `reward` field to the rows, or a grader, or choose reward: {scheme: uniform}.",
    "sum_delta": "Score with per-token ratios, or choose approximation: exact.",
    "distance": "Measure the distances, or choose distance: initial_nll.",
    "round": "Score the rows with the policy as each round begins.",
}


@dataclass(frozen=True)
class Batch:
    """One global batch as `weigh` sees it. Columns ending in _A have active rows only."""

    prior_N: FloatArray
    active_N: BoolArray
    prior_A: FloatArray
    num_tokens_A: FloatArray
    group_A: IntArray
    row_A: IntArray | None
    columns_A: dict[str, FloatArray]  # what the weighting needs, and log_reference_N where it is known

    @property
    def size(self) -> int:
        return len(self.prior_N)

    @classmethod
    def of(cls, evidence: Evidence, weighting: Weighting) -> Batch:
        """Check shapes and numbers: `ConfigError` for a missing column, `NumericsError` for a bad row."""
        size = evidence.size
        if size == 0:
            raise NumericsError("the batch is empty.", mend="A global batch needs at least one sample.")
        wanted = needs(weighting)
        for need in sorted(wanted):
            if getattr(evidence, _COLUMN_OF_NEED[need]) is None:
                raise ConfigError(
                    f"this weighting needs {_COLUMN_OF_NEED[need]}, which the batch does not have.",
                    mend=_WAY_OUT[need],
                    param="method.weighted.reward.scheme"
                    if need == "rewards"
                    else "method.weighted.likelihood",
                )
        row_N = _row_numbers(evidence)
        prior_N = _column(evidence.prior_N, size, "prior_N", default=1.0)
        num_tokens_N = _column(evidence.num_tokens_N, size, "num_tokens_N")
        _refuse(
            ~(np.isfinite(prior_N) & (prior_N >= 0)),
            prior_N,
            row_N,
            "prior weight",
            "must be finite and >= 0",
        )
        _refuse(~(num_tokens_N > 0), num_tokens_N, row_N, "number of trained tokens", "must be positive")
        if not prior_N.any():
            raise NumericsError(
                "every prior weight of the batch is zero.", mend="Give some rows a `weight` above 0."
            )

        active_N = np.ones(size, bool)
        if evidence.is_replay_N is not None:
            active_N &= ~np.asarray(evidence.is_replay_N, bool)
        if "rewards" in wanted:
            active_N &= ~np.isnan(_column(evidence.rewards_N, size, "rewards_N"))

        columns_A: dict[str, FloatArray] = {}
        for need, name in _COLUMN_OF_NEED.items():
            given = getattr(evidence, name)
            if need not in wanted and (name != "log_reference_N" or given is None):
                continue
            column_N = _column(given, size, name)
            if need in wanted:
                bad_N = active_N & ~np.isfinite(column_N)
                _refuse(bad_N, column_N, row_N, name, "must be finite: the row cannot be weighted")
            columns_A[name] = column_N[active_N]
        return cls(
            prior_N=prior_N,
            active_N=active_N,
            prior_A=prior_N[active_N],
            num_tokens_A=num_tokens_N[active_N],
            group_A=_groups(evidence, size)[active_N],
            row_A=None if evidence.row_N is None else np.asarray(evidence.row_N)[active_N],
            columns_A=columns_A,
        )

    def column(self, name: str) -> FloatArray:
        """What a scheme asks for by a column's name."""
        return self.num_tokens_A if name == "num_tokens_N" else self.columns_A[name]

    def log_ratio(self, f: Any) -> FloatArray:
        """L of METHODS.md section 2: the chosen log ratio over T^kappa; sum of deltas for first_order."""
        if getattr(f, "approximation", "exact") == "first_order":
            return self.columns_A["sum_delta_N"]
        return self._summed_log_ratio(f.of) / self.num_tokens_A**f.length_exponent

    def _summed_log_ratio(self, of: str) -> FloatArray:
        column = self.columns_A
        match of:
            case "policy_over_initial":
                return column["log_policy_N"] - column["log_reference_N"]
            case "policy_over_data":
                return column["log_policy_N"] - column["log_behavior_N"]
            case "initial_over_policy":
                return column["log_reference_N"] - column["log_policy_N"]
            case "policy":
                return column["log_policy_N"]
            case "initial":
                return column["log_reference_N"]
            case "round_over_data":  # the first round begins at the start
                began_A = column["log_round_N" if "log_round_N" in column else "log_reference_N"]
                return began_A - column["log_behavior_N"]
        raise ConfigError(f"there is no ratio {of!r}.", param="method.weighted.likelihood.of")

    @property
    def initial_nll_A(self) -> FloatArray | None:
        """Mean NLL per token under the frozen start, nats; None where it is not known of every row."""
        log_reference_A = self.columns_A.get("log_reference_N")
        if log_reference_A is None or not np.isfinite(log_reference_A).all():
            return None
        return -log_reference_A / self.num_tokens_A


def _column(given: Any, size: int, name: str, default: float | None = None) -> FloatArray:
    if given is None and default is not None:
        return np.full(size, default)
    column_N = np.asarray(given, np.float64)
    if column_N.shape != (size,):
        raise NumericsError(f"{name} has shape {column_N.shape}; expected ({size},), one entry per sample.")
    return column_N


def _row_numbers(evidence: Evidence) -> IntArray:
    return np.arange(evidence.size) if evidence.row_N is None else np.asarray(evidence.row_N)


def _groups(evidence: Evidence, size: int) -> IntArray:
    """Group numbers; rows without one (negative, or no column) are groups of their own."""
    own_N = -1 - np.arange(size)
    if evidence.group_N is None:
        return own_N
    group_N = np.asarray(evidence.group_N, np.int64)
    return np.where(group_N < 0, own_N, group_N)


def _refuse(bad_N: BoolArray, values_N: FloatArray, row_N: IntArray, what: str, must: str) -> None:
    if bad_N.any():
        first = int(np.argmax(bad_N))
        more = f" ({int(bad_N.sum()) - 1} more rows alike)" if bad_N.sum() > 1 else ""
        raise NumericsError(
            f"row {row_N[first]}: {what} is {values_N[first]:g}, which {must}{more}.",
            mend="Look at that row: an impossible token, an overflow in low precision, or a damaged score.",
        )
