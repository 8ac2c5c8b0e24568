"""Effective sample sizes, and the root finding behind every floor on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq

from modeseek_ray.types import FloatArray
from modeseek_ray.weights.sums import dot

_RELATIVE = 1e-13  # how exactly a root is found; finer costs one more pass over all samples


def effective_sample_size(weights_N: FloatArray) -> float:
    """(sum v)^2 / sum v^2: how many equally weighted samples are worth as much (Kish). 0 for no weight.

    >>> effective_sample_size(np.array([1., 1., 0., 0.]))
    2.0
    """
    weights_N = np.asarray(weights_N, float)
    largest = np.abs(weights_N).max(initial=0.0)
    if largest == 0:
        return 0.0
    scaled_N = np.abs(weights_N) / largest  # so that squares stay within range
    return float(scaled_N.sum() ** 2 / dot(scaled_N, scaled_N))


def log_conditional_ess(log_u_N: FloatArray, base_N: FloatArray) -> float:
    """log of (sum b u)^2 / sum b u^2 for a base that sums to one: 2 K(1) - K(2) with K of u's powers.

    Between log(b-mass tied at the largest u) and 0; uniform b gives ESS / n. -inf u means zero.
    """
    live_N = base_N > 0
    if not live_N.all():
        log_u_N, base_N = log_u_N[live_N], base_N[live_N]
    most = log_u_N.max(initial=-np.inf)
    if most == -np.inf:
        return -np.inf
    u_N = np.exp(log_u_N - most)
    first = dot(base_N, u_N)
    np.square(u_N, out=u_N)
    return float(2 * np.log(first) - np.log(dot(base_N, u_N)))


def largest_feasible(log_ess: Callable[[float], float], floor: float, cap: float) -> tuple[float, bool]:
    """The largest x in [0, cap] with log_ess(x) >= log(floor), and whether the floor decided it.

    `log_ess(0)` must be 0. Solved in x^2, in which log ESS is nearly straight (Gaussian log ratios:
    exactly), so the bracketed finder needs about ten passes. The end returned is always feasible.
    """
    target = float(np.log(floor))
    at_cap = log_ess(cap) - target
    if at_cap >= 0:
        return cap, False
    known = {0.0: -target, cap * cap: at_cap}

    def excess(square: float) -> float:
        if square not in known:
            known[square] = log_ess(float(np.sqrt(square))) - target
        return known[square]

    root = float(brentq(excess, 0.0, cap * cap, xtol=1e-300, rtol=_RELATIVE, maxiter=1000))
    x, feasible, back = float(np.sqrt(root)), excess(root) >= 0, _RELATIVE
    while x > 0 and not feasible:  # rounding may leave the root just outside
        x *= 1 - min(back, 0.5)
        feasible = log_ess(x) >= target
        back *= 2
    return x, True


def largest_feasible_unbounded(
    log_ess: Callable[[float], float], floor: float, scale: float
) -> tuple[float, bool]:
    """The same without a cap: the bracket grows from `scale` by eights, up to 8^14 scales.

    If the floor never binds, the end of the bracket and False.
    """
    high = scale
    for _ in range(14):
        x, bound = largest_feasible(log_ess, floor, high)
        if bound:
            return x, True
        high *= 8
    return high, False
