"""f: weighting by likelihood. Each scheme returns log f, from L = (log ratio summed over tokens) / T^kappa.

Positional parameters are evidence, found by name; keyword defaults are the configuration.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from modeseek_ray.strict import Pair, Strict
from modeseek_ray.types import FloatArray
from modeseek_ray.weights.gamma import Gamma

Of = Literal[
    "policy_over_initial", "policy_over_data", "policy", "initial", "initial_over_policy", "round_over_data"
]
REAL_RATIOS = ("policy_over_initial", "policy_over_data", "initial_over_policy", "round_over_data")
# Whose single tokens a trainer can see: the frozen start's, and a sampler's that came with the rows.
FIRST_ORDER_RATIOS = ("policy_over_initial", "initial_over_policy", "policy_over_data")
RATIOS_TO_START = ("policy_over_initial", "initial_over_policy")  # exactly 1 before the first update
_EXP_LIMIT = 700.0  # exp(709.8) is the largest double


class Ratio(Strict):
    """What every scheme on a log ratio has in common."""

    of: Of = "policy_over_initial"
    """Which ratio w: it decides what is learnt (see the fixed-point table in weights/README.md)."""
    length_exponent: float = Field(1.0, ge=0, le=1)
    """kappa in L = log w / T^kappa: 0 is the exact sequence ratio, 1 per token."""
    clip: Pair | None = None
    """Clip f to [low, high] before anything is normalised (iw-SFT: [0, 16])."""


def uniform() -> FloatArray:
    """f = 1

    What: every row counts by its prior: plain SFT.
    Use: as the baseline, or when only rewards, priors or token factors shall speak.
    Not: never wrong.
    """
    return np.zeros(())


def ratio_power(
    log_ratio_N: FloatArray, *, gamma: Gamma = 0.5, approximation: Literal["exact", "first_order"] = "exact"
) -> FloatArray:
    """f = w^gamma = exp(gamma L)

    What: tempers a likelihood ratio; which one (`of`) decides the fixed point. With
    approximation: first_order, f = max(0, 1 + gamma sum_t delta_t) at length_exponent 0, delta_t + 1 being
    the same ratio of one token.
    Use: to prefer or avoid samples by how likely they are; gamma 0.3-0.7, or by ESS.
    Not: gamma >= 1 with `policy` or `policy_over_initial` (collapses); first_order beyond gamma 0.5.
    """
    if approximation == "first_order":
        return log_positive(1.0 + gamma * log_ratio_N)
    return gamma * log_ratio_N


def linear(log_ratio_N: FloatArray, *, gamma: Gamma = 0.5) -> FloatArray:
    """f = max(0, 1 + gamma (w - 1)), w = exp(L)

    What: the first-order form of w^gamma, with heavier tails on one side and zeros on the other.
    Use: for real ratios near 1, where an interpolation between SFT and importance weights is wanted.
    Not: `policy` and `initial`, which are not ratios; ratios far from 1.
    """
    within_N = np.minimum(log_ratio_N, _EXP_LIMIT)
    beyond_N = (log_ratio_N - within_N) * (gamma > 0)  # beyond exp's range 1 is lost beside gamma w
    return log_positive(1.0 + gamma * np.expm1(within_N)) + beyond_N


def log_positive(x_N: FloatArray) -> FloatArray:
    """log max(0, x), without a warning at zero."""
    return np.log(x_N, out=np.full(np.shape(x_N), -np.inf), where=x_N > 0)
