"""Look before you train: what a weighting would do to the rows, as they stand at the start.

Before the first step policy and start are one model, so every ratio between the two is exactly one
and such a weighting treats all rows alike; what is static (likelihood under the start, rewards,
priors) already shows. The rows are weighed as one batch, warm-ups taken as over.

    N  rows    B  histogram bins
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from modeseek_ray.errors import ModeseekError
from modeseek_ray.types import Evidence, FloatArray, IntArray
from modeseek_ray.weights.likelihood import RATIOS_TO_START
from modeseek_ray.weights.metrics import STARVED_BELOW
from modeseek_ray.weights.registry import positionals, scheme_of
from modeseek_ray.weights.weigh import weigh
from modeseek_ray.weights.weighting import Weighting, first_order_ratio, uses_likelihood

DOMINANT_ABOVE = 5.0  # times the mean weight
ROWS_NAMED = 10  # of each kind; counts are of all
# In log2 of the weight: the first bin also takes what is smaller, zero included, the last what is larger.
BIN_EDGES = np.linspace(-7.0, 4.0, 23)

RATIOS_ARE_ONE = (
    "All ratios of policy to start are one before the first step, so they tell no row from another yet; they"
    " will as the policy moves. What is shown is what remains: priors, rewards, signs of pairs."
)
TOKENS_ALONE = "Its factors act on single tokens during training; as samples all rows count by their prior."


@dataclass(frozen=True)
class Slice:
    """Rows with something in common: a source (`task`), or a bin of lengths."""

    label: str
    num_rows: int
    mean: float  # of the weight; 1 = the average row
    weight_share: float
    num_starved: int
    verdict: str  # "starves", "dominates" or ""


@dataclass(frozen=True)
class RowWeight:
    """One row and its weight."""

    row: int
    weight: float


@dataclass(frozen=True)
class Outlook:
    """What one weighting gives. Correlations are None where one side does not vary."""

    name: str
    num_rows: int
    ess_ratio: float
    gamma: float | None
    beta: float | None
    bound_by: str
    counts_B: tuple[int, ...]  # of weights over their mean, in BIN_EDGES
    num_starved: int
    num_dominant: int
    starved: tuple[RowWeight, ...]  # the lightest first
    dominant: tuple[RowWeight, ...]  # the heaviest first
    by_source: tuple[Slice, ...]
    by_length: tuple[Slice, ...]
    corr_length: float | None
    corr_initial_nll: float | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**asdict(self), "bin_edges_log2": BIN_EDGES.tolist()}


def at_start(evidence: Evidence) -> Evidence:
    """The same rows with the policy where it begins: log pi = log pi_0, no drift, no distance."""
    zero_N = np.zeros(evidence.size)
    return replace(
        evidence,
        log_policy_N=evidence.log_reference_N,
        log_round_N=evidence.log_reference_N,
        sum_delta_N=zero_N,
        distance_N=zero_N.copy(),
    )


def outlook(
    evidence: Evidence,
    weighting: Weighting,
    *,
    name: str,
    length_N: IntArray,
    source_N: Sequence[str],
) -> Outlook:
    """Weigh all rows as one batch at the start. `length_N` counts all tokens, `source_N` are `task` labels.

    Raises `ConfigError` where the rows lack what the weighting looks at, `NumericsError` where they
    cannot be weighed by it (too few samples of a prompt), as `weigh` does.

    >>> rows = Evidence(None, np.array([-2.0, -8.0]), np.array([2, 2]))
    >>> seen = outlook(rows, Weighting(), name="sft", length_N=np.array([4, 4]), source_N=["a", "a"])
    >>> seen.ess_ratio, seen.by_source[0].mean
    (1.0, 1.0)
    """
    start = at_start(evidence)
    if first_order_ratio(weighting) == "policy_over_data":  # its tokens are scored by trainers alone
        start = replace(start, sum_delta_N=None)
    weights = weigh(start, weighting)
    size_N = np.abs(weights.values_N)  # a signed advantage pushes as hard either way
    relative_N = size_N / size_N.mean() if size_N.any() else size_N
    row_N = np.arange(evidence.size) if evidence.row_N is None else evidence.row_N
    rising_N = np.lexsort((row_N, relative_N))
    falling_N = np.lexsort((row_N, -relative_N))
    starved_N, dominant_N = relative_N < STARVED_BELOW, relative_N > DOMINANT_ABOVE

    def named(order_N: IntArray, chosen_N: Any) -> tuple[RowWeight, ...]:
        kept = order_N[chosen_N[order_N]][:ROWS_NAMED]
        return tuple(RowWeight(int(row_N[i]), float(relative_N[i])) for i in kept)

    return Outlook(
        name=name,
        num_rows=evidence.size,
        ess_ratio=weights.ess_ratio,
        gamma=weights.gamma,
        beta=weights.beta,
        bound_by=weights.bound_by,
        counts_B=tuple(_histogram(relative_N).tolist()),
        num_starved=int(starved_N.sum()),
        num_dominant=int(dominant_N.sum()),
        starved=named(rising_N, starved_N),
        dominant=named(falling_N, dominant_N),
        by_source=_slices(np.asarray(source_N, dtype=object), relative_N),
        by_length=_slices(_length_bins(length_N), relative_N),
        corr_length=weights.metrics.get("corr_length"),
        corr_initial_nll=weights.metrics.get("corr_initial_nll"),
        notes=(*_notes(weighting), *weights.warnings),
    )


def not_possible(name: str, error: ModeseekError, num_rows: int) -> dict[str, Any]:
    """What stands in an outlook's place where the data cannot be weighed by it."""
    return {"name": name, "num_rows": num_rows, "error": error.to_dict()}


def _notes(weighting: Weighting) -> tuple[str, ...]:
    by_ratio = uses_likelihood(weighting) and getattr(weighting.likelihood, "of", None) in RATIOS_TO_START
    by_margin = {"log_policy_N", "log_reference_N"} <= set(positionals(scheme_of("reward", weighting.reward)))
    if by_ratio or by_margin:
        return (RATIOS_ARE_ONE,)
    plain = weighting.likelihood.scheme == "uniform" and weighting.reward.scheme == "uniform"
    return (TOKENS_ALONE,) if plain and weighting.token.scheme != "none" else ()


def _histogram(relative_N: FloatArray) -> IntArray:
    with np.errstate(divide="ignore"):
        log_N = np.clip(np.log2(np.maximum(relative_N, 0.0)), BIN_EDGES[0], BIN_EDGES[-1])
    return np.histogram(log_N, bins=BIN_EDGES)[0]


def _length_bins(length_N: IntArray) -> Any:
    """Labels by powers of two, so that they sort as the lengths do: `33–64`."""
    upper_N = 2 ** np.ceil(np.log2(np.maximum(length_N, 1))).astype(np.int64)
    return np.array([f"{upper // 2 + 1}–{upper}" if upper > 1 else "1" for upper in upper_N], dtype=object)


def _slices(label_N: Any, relative_N: FloatArray) -> tuple[Slice, ...]:
    """In the order of the labels' numbers, if they begin with one, else of their names."""
    labels, slice_N = np.unique(label_N.astype(str), return_inverse=True)
    total = relative_N.sum()
    slices = []
    for index, label in enumerate(labels.tolist()):
        inside_M = relative_N[slice_N == index]
        mean = float(inside_M.mean())
        verdict = "starves" if mean < STARVED_BELOW else "dominates" if mean > DOMINANT_ABOVE else ""
        slices.append(
            Slice(
                label=label,
                num_rows=len(inside_M),
                mean=mean,
                weight_share=float(inside_M.sum() / total) if total > 0 else 0.0,
                num_starved=int((inside_M < STARVED_BELOW).sum()),
                verdict=verdict,
            )
        )
    return tuple(sorted(slices, key=_order))


def _order(part: Slice) -> tuple[int, str]:
    first = part.label.split("–")[0]
    return (int(first), "") if first.isdecimal() else (0, part.label)
