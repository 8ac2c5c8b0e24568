"""Sums of the weights: exact to the last bits, and made by one thread."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from modeseek_ray.weights.sums import dot


@pytest.mark.parametrize("size", [0, 1, 7, 1_000, 300_000])
def test_a_dot_product_is_that_of_exact_addition(size: int) -> None:
    rng = np.random.default_rng(size)
    x_N, y_N = rng.normal(size=size), rng.lognormal(sigma=3, size=size)
    products = [float(x) * float(y) for x, y in zip(x_N, y_N, strict=True)]
    assert dot(x_N, y_N) == pytest.approx(math.fsum(products), abs=1e-14 * sum(map(abs, products)))


WEIGH = """
import time
from tests.bench.weighing import evidence, weigh, weighting
batch, chosen = evidence(200_000), weighting()
weigh(batch, chosen)
all_threads, this_one = time.process_time(), time.thread_time()
for _ in range(3):
    weigh(batch, chosen)
print((time.process_time() - all_threads) / (time.thread_time() - this_one))
"""


def test_weighing_leaves_the_other_cores_alone() -> None:
    """A matrix library's threads would spin beside it: twice the processor time on two cores."""
    variables = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", WEIGH]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=True)
    assert float(run.stdout) < 1.2
