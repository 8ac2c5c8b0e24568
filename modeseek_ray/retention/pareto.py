"""Old-task retention against new-task success: which points nothing beats, and the headline figure.

Legend: M points to compare; E evaluations along one job's path. Larger is better on both axes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from modeseek_ray.types import BoolArray


def pareto_front(success_M: ArrayLike, retention_M: ArrayLike) -> BoolArray:
    """True for the points no other point beats: at least as good on both axes and better on one.

    Equal points do not beat each other. A point with a NaN is never on the front.

    >>> pareto_front([0.9, 0.5, 0.4], [0.2, 0.8, 0.7]).tolist()
    [True, True, False]
    """
    x_M = np.asarray(success_M, dtype=np.float64)
    y_M = np.asarray(retention_M, dtype=np.float64)
    front_M = np.isfinite(x_M) & np.isfinite(y_M)
    for i in np.flatnonzero(front_M):
        as_good_M = (x_M >= x_M[i]) & (y_M >= y_M[i])
        better_M = (x_M > x_M[i]) | (y_M > y_M[i])
        front_M[i] = not bool(np.any(as_good_M & better_M))
    return front_M


def retention_at_success(success_E: ArrayLike, retention_E: ArrayLike, target: float = 0.9) -> float | None:
    """Retention when the path first reaches `target` new-task success, between evaluations linearly.

    METHODS.md section 8 compares methods at equal success, so that one that learnt less cannot win
    by having changed less. None if the target is never reached.

    >>> retention_at_success([0.0, 0.5, 1.0], [1.0, 1.0, 0.5], target=0.75)
    0.75
    """
    x_E = np.asarray(success_E, dtype=np.float64)
    y_E = np.asarray(retention_E, dtype=np.float64)
    known_E = np.isfinite(x_E) & np.isfinite(y_E)
    x_E, y_E = x_E[known_E], y_E[known_E]
    reached = np.flatnonzero(x_E >= target)
    if len(reached) == 0:
        return None
    at = int(reached[0])
    if at == 0:
        return float(y_E[0])
    share = (target - x_E[at - 1]) / (x_E[at] - x_E[at - 1])
    return float(y_E[at - 1] + share * (y_E[at] - y_E[at - 1]))
