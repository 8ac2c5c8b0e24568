"""The optimum of E[r] - beta KL to first order in a feature space: re-ranks best-of-N without training.

N  samples      D  features
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    `features_ND` are mean hidden states, say; without `group_N` all samples are of one prompt.

    >>> first_order_solver(np.array([[0.], [4.]]), np.array([0., 1.]), beta=1.0, ridge=0.0).theta_D
    array([0.25])
    """
    features_ND = np.asarray(features_ND, np.float64)
    rewards_N = np.asarray(rewards_N, np.float64)
    num, dim = features_ND.shape
    scope = Scope.of(np.zeros(num, np.int64) if group_N is None else group_N, np.ones(num))
    centred_ND = np.stack([column - scope.spread(scope.mean(column)) for column in features_ND.T], axis=1)
    centred_N = rewards_N - scope.spread(scope.mean(rewards_N))
    covariance_DD = centred_ND.T @ centred_ND / num + ridge * np.eye(dim)
    theta_D = np.linalg.solve(covariance_DD, centred_ND.T @ centred_N / num) / beta
    weights_N = 1 + centred_ND @ theta_D
    return FirstOrderSolution(theta_D, weights_N, float((weights_N < 0).mean()))
