"""What keeps single rows from taking over. Each says how often it bound."""

from __future__ import annotations

import numpy as np

from modeseek_ray.types import FloatArray

MIN_ROWS_FOR_TAIL = 25  # Pareto smoothing fits at least 5 points: min(n/5, 3 sqrt n) > 4


def cap_keeping_sum(values_N: FloatArray, cap: float) -> tuple[FloatArray, float]:
    """v_i = min(C, s v_i) with s solved so that the sum stays; and the cap used.

    Clipping and renormalising would break the cap. If fewer than sum/C rows are positive no s exists:
    C is raised to sum / rows.

    >>> cap_keeping_sum(np.array([8., 1., 1.]), 4.0)
    (array([4., 3., 3.]), 4.0)
    """
    if values_N.max(initial=0.0) <= cap:
        return values_N, cap
    total = values_N.sum()
    positive = int(np.count_nonzero(values_N))
    if positive * cap < total:
        return np.where(values_N > 0, total / positive, 0.0), float(total / positive)
    # With the k largest at C the rest is scaled by s_k = (total - kC) / (their sum); take the first k
    # whose s_k keeps the next one at or under C.
    falling_N = np.sort(values_N)[::-1]
    rest_N = np.cumsum(falling_N[::-1])[::-1]  # sum from the k-th on: small numbers first, for accuracy
    left_N = total - np.arange(len(values_N)) * cap
    # Shares of the rest, never s_k itself: over the smallest doubles it is beyond the largest.
    share_N = np.divide(falling_N, rest_N, out=np.zeros(len(rest_N)), where=rest_N > 0)
    fits_N = (left_N * share_N <= cap) & (left_N >= 0) & (rest_N > 0)
    if not fits_N.any():  # every positive row at C
        return np.where(values_N > 0, cap, 0.0), cap
    k = int(np.argmax(fits_N))
    capped_N = np.full(len(values_N), cap)
    free_N = values_N <= falling_N[k]
    capped_N[free_N] = np.minimum(cap, left_N[k] * (values_N[free_N] / rest_N[k]))
    return capped_N, cap


def pareto_smooth(log_u_N: FloatArray) -> tuple[FloatArray, float | None]:
    """Pareto-smoothed log weights and k-hat of their tail; unchanged and None where there is no tail to fit.

    Rows at -inf stay there. k-hat above 0.7 says that a few rows decide everything (Vehtari et al. 2024).
    """
    live_N = np.isfinite(log_u_N)
    log_u_L = log_u_N[live_N]
    if len(log_u_L) < MIN_ROWS_FOR_TAIL or np.ptp(log_u_L) < 1e-9:
        return log_u_N, None
    from arviz_stats.base import array_stats  # two seconds to import: not for who only reads configurations

    try:
        with np.errstate(all="ignore"):
            smooth_L, khat = array_stats.psislw(-log_u_L)
    except ValueError:  # the whole tail is one value
        return log_u_N, None
    if not (np.isfinite(khat) and np.isfinite(smooth_L).all()):
        return log_u_N, None
    smooth_N = log_u_N.copy()
    smooth_N[live_N] = smooth_L
    return smooth_N, float(khat)
