"""Direct preference optimisation as signed sample weights.

The loss of a pair is -log sigma(m), m = beta (log w_chosen - log w_rejected), w = pi / pi_0 of the whole
response (2305.18290). Its gradient is -beta sigma(-m) (grad log pi_chosen - grad log pi_rejected): a policy
gradient whose weights are known as soon as both responses are scored. So the trainer's ordinary step,
with log-probabilities summed over each sample (`aggregation: sum`), takes the very DPO step.

    N  rows      P  pairs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import expit

from modeseek_ray.types import FloatArray, IntArray
from modeseek_ray.weights.scope import Scope


@dataclass(frozen=True)
class Pairs:
    """The best and the worst row of each prompt whose rewards are not all equal."""

    chosen_P: IntArray
    rejected_P: IntArray

    @classmethod
    def of(cls, rewards_N: FloatArray, scope: Scope) -> Pairs:
        """Ties go to the row that comes first; rows of zero prior take no part."""
        best_S, worst_S = scope.max(rewards_N), scope.min(rewards_N)
        live_N = scope.prior_N > 0
        paired_N = live_N & (scope.spread(best_S) > scope.spread(worst_S))

        def first(extreme_S: FloatArray) -> IntArray:
            rows = np.flatnonzero(paired_N & (rewards_N == scope.spread(extreme_S)))
            return rows[np.unique(scope.segment_N[rows], return_index=True)[1]]

        return cls(first(best_S), first(worst_S))

    def __len__(self) -> int:
        return len(self.chosen_P)

    def margins(self, log_ratio_N: FloatArray, beta: float) -> FloatArray:
        """m of each pair: how much more than the start the policy prefers the chosen response."""
        return beta * (log_ratio_N[self.chosen_P] - log_ratio_N[self.rejected_P])


def preference(
    rewards_N: FloatArray,
    log_policy_N: FloatArray,
    log_reference_N: FloatArray,
    scope: Scope,
    *,
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1,
) -> FloatArray:
    """v = +-(n/P) beta sigma(-m), m = beta (log w_chosen - log w_rejected)

    What: the gradient of DPO's mean of -log sigma(m) over the batch's P pairs: each prompt's best row is
    pushed up, its worst down, others get zero. w = pi/pi_0 of the whole response. The loss that is
    logged is DPO's own. Signed: not normalised, no f, no ESS, no guards.
    Use: preference pairs (Rafailov et al. 2023), with `training.aggregation: sum`.
    Not: models with dropout (weights are scored without it); answers that differ mostly in length.
    """
    values_N = np.zeros(len(rewards_N))
    pairs = Pairs.of(rewards_N, scope)
    if len(pairs):
        margin_P = pairs.margins(log_policy_N - log_reference_N, beta)
        strength_P = len(rewards_N) / len(pairs) * beta * expit(-margin_P)
        values_N[pairs.chosen_P] = strength_P
        values_N[pairs.rejected_P] = -strength_P
    return values_N


def preference_metrics(
    rewards_N: FloatArray, log_ratio_N: FloatArray, scope: Scope, beta: float
) -> Mapping[str, float]:
    """DPO's loss (prior-weighted like the gradient), the share of pairs ranked rightly, and mean margins."""
    pairs = Pairs.of(rewards_N, scope)
    if not len(pairs):
        return {"pairs": 0.0, "preference_loss": 0.0}
    margin_P = pairs.margins(log_ratio_N, beta)
    loss_P = scope.prior_N[pairs.chosen_P] * np.logaddexp(0.0, -margin_P)
    return {
        "pairs": float(len(pairs)),
        "preference_loss": float(loss_P.mean()),
        "preference_accuracy": float((margin_P > 0).mean()),
        "preference_margin": float(margin_P.mean()),
    }
