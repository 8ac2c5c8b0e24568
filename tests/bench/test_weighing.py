"""The weighing benchmark measures what it says, at sizes that take no time."""

from __future__ import annotations

import pytest

from modeseek_ray.weights import weigh
from tests.bench.weighing import evidence, gamma_root, late_in_the_job, scaling, slope, weighting


def test_both_controllers_are_at_work() -> None:
    weights = weigh(evidence(4000), weighting())
    assert weights.bound_by == "ess" and weights.beta is not None
    assert weights.metrics["ess_ratio_likelihood"] == pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize("size", [64, 10_000])
def test_root_finding_equals_sixty_halvings_in_a_fifth_of_the_passes(size: int) -> None:
    root = gamma_root(size, repeats=1)
    assert root.found == pytest.approx(root.bisected, abs=1e-9)
    assert root.passes <= 11


def test_a_step_late_in_the_job_costs_what_its_batch_does() -> None:
    """Copying what is remembered of 300,000 rows, one by one, took twenty times the first step."""
    assert late_in_the_job(300_000).ratio < 3


def test_slope_by_hand() -> None:
    assert slope({10_000: 0.1, 100_000: 1.0, 1_000_000: 10.0}) == pytest.approx(1.0)
    assert slope({10_000: 0.1, 1_000_000: 0.1 * 10**3}) == pytest.approx(1.5)
    assert set(scaling([16, 32])) == {16, 32}
