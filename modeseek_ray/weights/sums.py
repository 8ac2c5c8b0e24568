"""Sums that come out alike on every machine."""

from __future__ import annotations

import numpy as np

from modeseek_ray.types import FloatArray


def dot(x_N: FloatArray, y_N: FloatArray) -> float:
    """sum x y, added up pairwise, by this thread alone.

    BLAS divides long vectors among as many threads as there are cores: the last bits of a weight would depend on
    the machine, and its threads spin for a while after each product, on cores that trainers want.
    """
    return float(np.multiply(x_N, y_N).sum())
