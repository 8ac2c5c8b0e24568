"""What to watch of a batch's weights (METHODS.md section 7): flat figures over its active rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from modeseek_ray.types import FloatArray
from modeseek_ray.weights.batch import Batch
from modeseek_ray.weights.guards import pareto_smooth
from modeseek_ray.weights.likelihood import log_positive
from modeseek_ray.weights.row_values import RowValues
from modeseek_ray.weights.solve import effective_sample_size
from modeseek_ray.weights.sums import dot

STARVED_BELOW = 0.1  # cumulative weight of a row over its visits


def measure(batch: Batch, values_A: FloatArray, memory: dict[str, Any]) -> dict[str, float]:
    """Figures of the final weights. Adds the rows' weights to the ledger in `memory`.

    Figures that do not exist (a correlation without variance, k-hat of too few rows) are left out.
    """
    size = len(values_A)
    metrics = {
        "ess_ratio": effective_sample_size(values_A) / size if size else 1.0,
        "active_rows": float(size),
        "neutral_rows": float(batch.size - size),
        "starved_share": _starved_share(batch, values_A, memory),
    }
    magnitude_A = np.abs(values_A)
    total = magnitude_A.sum()
    if total > 0:
        share_A = np.sort(magnitude_A / total)[::-1]
        live_A = share_A[share_A > 0]
        metrics |= {
            "largest_share": float(share_A[0]),
            "top1pct_share": float(share_A[: -(-size // 100)].sum()),
            "entropy": float(-dot(live_A, np.log(live_A))),  # nats; ln n for equal weights
            "max_weight": float(values_A.max()),
            "zero_share": float((values_A == 0).mean()),
        }
    khat = pareto_smooth(log_positive(values_A))[1]
    optional = {
        "khat": khat,
        "corr_length": _correlation(values_A, batch.num_tokens_A),
        "corr_initial_nll": _correlation(values_A, batch.initial_nll_A),
    }
    return {**metrics, **{name: value for name, value in optional.items() if value is not None}}


def _correlation(x_A: FloatArray, y_A: FloatArray | None) -> float | None:
    """Pearson's; None without variance on either side."""
    if y_A is None or len(x_A) < 2 or np.ptp(x_A) == 0 or np.ptp(y_A) == 0:
        return None
    x_A, y_A = x_A - x_A.mean(), y_A - y_A.mean()
    x_A, y_A = x_A / np.abs(x_A).max(), y_A / np.abs(y_A).max()  # squares stay within range
    return float(dot(x_A, y_A) / np.sqrt(dot(x_A, x_A) * dot(y_A, y_A)))


def _starved_share(batch: Batch, values_A: FloatArray, memory: dict[str, Any]) -> float:
    """Share of the rows met so far whose weights add up to less than 0.1; of this batch without row numbers."""
    if batch.row_A is None or not RowValues.can_number(batch.row_A):
        return float((values_A < STARVED_BELOW).mean()) if len(values_A) else 0.0
    ledger = RowValues.of(memory.get("ledger"))
    rows, starved = memory.get("ledger_rows"), memory.get("ledger_starved")
    if rows is None or starved is None:  # the first batch, or a checkpoint of before they were kept
        known = ledger.known
        rows, starved = len(known), int((known < STARVED_BELOW).sum())
    row_U, place_A = np.unique(batch.row_A, return_inverse=True)
    before_U = ledger.at(row_U)
    after_U = np.nan_to_num(before_U)
    np.add.at(after_U, place_A, values_A)  # in the order of the batch: a resumed job adds the same way
    rows += int(np.isnan(before_U).sum())
    starved += int((after_U < STARVED_BELOW).sum()) - int((before_U < STARVED_BELOW).sum())
    memory |= {"ledger": ledger.put(row_U, after_U), "ledger_rows": rows, "ledger_starved": starved}
    return starved / rows if rows else 0.0
