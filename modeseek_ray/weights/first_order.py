"""The optimum of E[r] - beta KL to first order in a feature space: re-ranks best-of-N without training.

N  samples      G  graded samples      D  features
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modeseek_ray.errors import NumericsError
from modeseek_ray.types import FloatArray, IntArray
from modeseek_ray.weights.scope import Scope


@dataclass(frozen=True)
class FirstOrderSolution:
    """`theta_D` and each sample's weight 1 + theta . (phi - mean phi of its prompt): rank by it.

    `negative_share` says how often the weight is below zero, where the linearisation does not hold.
    """

    theta_D: FloatArray
    weights_N: FloatArray
    negative_share: float


def first_order_solver(
    features_ND: FloatArray,
    rewards_N: FloatArray,
    *,
    beta: float,
    group_N: IntArray | None = None,
    ridge: float = 1e-6,
) -> FirstOrderSolution:
    """theta* = (Cov phi + ridge I)^-1 Cov(phi, r) / beta, population covariances within prompts.

    `features_ND` are mean hidden states, say; without `group_N` all samples are of one prompt. Samples
    whose reward is NaN take no part in theta, and get weights all the same: that is what re-ranks them.
    Raises `NumericsError` where no sample is graded.

    >>> first_order_solver(np.array([[0.], [4.]]), np.array([0., 1.]), beta=1.0, ridge=0.0).theta_D
    array([0.25])
    """
    features_ND = np.asarray(features_ND, np.float64)
    rewards_N = np.asarray(rewards_N, np.float64)
    num, dim = features_ND.shape
    group_N = np.zeros(num, np.int64) if group_N is None else np.asarray(group_N)
    graded_N = ~np.isnan(rewards_N)
    if not graded_N.any():
        raise NumericsError("no sample has a reward.", mend="Grade some of them.")
    known_GD = _centred(features_ND[graded_N], group_N[graded_N])
    known_G = _centred(rewards_N[graded_N, None], group_N[graded_N])[:, 0]
    covariance_DD = known_GD.T @ known_GD / len(known_G) + ridge * np.eye(dim)
    theta_D: FloatArray = np.asarray(
        np.linalg.solve(covariance_DD, known_GD.T @ known_G / len(known_G)) / beta, np.float64
    )
    weights_N = 1 + _centred(features_ND, group_N) @ theta_D
    return FirstOrderSolution(theta_D, weights_N, float((weights_N < 0).mean()))


def best_of_each(weights_N: FloatArray, group_N: IntArray) -> IntArray:
    """Index of the heaviest sample of each prompt, in the order of their group numbers; ties to the first.

    >>> best_of_each(np.array([0.5, 2.0, 1.0, 1.0]), np.array([7, 7, 3, 3])).tolist()
    [2, 1]
    """
    order_N = np.lexsort((-np.asarray(weights_N), group_N))
    return order_N[np.unique(np.asarray(group_N)[order_N], return_index=True)[1]]


def _centred(values_ND: FloatArray, group_N: IntArray) -> FloatArray:
    """Each column minus its mean over the samples of the same prompt."""
    scope = Scope.of(group_N, np.ones(len(group_N)))
    return np.stack([column - scope.spread(scope.mean(column)) for column in values_ND.T], axis=1)
