"""What holds for every batch: invariances, monotonicity, limits, extremes. Any warning is a failure."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modeseek_ray.errors import NumericsError
from modeseek_ray.weights import PRESETS, Evidence, Weighting, effective_sample_size, weigh
from modeseek_ray.weights.registry import SCHEMES
from modeseek_ray.weights.solve import largest_feasible, log_conditional_ess

pytestmark = pytest.mark.filterwarnings("error")

SIZES = st.integers(1, 40)
LOG_RATIOS = SIZES.flatmap(lambda n: arrays(np.float64, n, elements=st.floats(-1000, 1000, width=32)))
REWARDS = SIZES.flatmap(lambda n: arrays(np.float64, n, elements=st.floats(-100, 100, width=32)))
FLOORS = st.floats(0.05, 0.95)
PER_EXAMPLE = settings(max_examples=25, deadline=None)


def ratios(log_ratio_N: np.ndarray, **more: Any) -> Evidence:
    n = len(log_ratio_N)
    return Evidence(log_ratio_N, np.zeros(n), np.ones(n), **more)


def rewarded(rewards_N: np.ndarray, **more: Any) -> Evidence:
    return Evidence(None, None, np.ones(len(rewards_N)), rewards_N=rewards_N, **more)


def by_power(gamma: Any, **guards: Any) -> Weighting:
    fields = {"likelihood": {"scheme": "ratio_power", "gamma": gamma}, "guards": {"cap": None, **guards}}
    return Weighting.model_validate(fields)


def by_reward(**reward: Any) -> Weighting:
    return Weighting.model_validate({"reward": reward, "guards": {"cap": None}})


def ess(floor: float, most: float = 2.0) -> dict[str, Any]:
    return {"ess": {"floor": floor, "max": most, "warmup": 0.0}}


@PER_EXAMPLE
@given(LOG_RATIOS, FLOORS)
def test_weights_are_finite_and_mean_one_and_the_floor_holds(log_ratio_N: np.ndarray, floor: float) -> None:
    weights = weigh(ratios(log_ratio_N), by_power(ess(floor)))
    assert np.isfinite(weights.values_N).all() and (weights.values_N >= 0).all()
    assert weights.values_N.mean() == pytest.approx(1.0, abs=1e-9)
    assert weights.gamma is not None and 0 <= weights.gamma <= 2.0
    assert weights.ess_ratio >= floor - 1e-9
    if weights.bound_by == "ess":
        assert weights.ess_ratio == pytest.approx(floor, rel=1e-6)
    json.dumps({**weights.state, **weights.metrics}, allow_nan=False)


@PER_EXAMPLE
@given(LOG_RATIOS, st.floats(-500, 500), FLOORS)
def test_a_shift_of_all_log_ratios_changes_nothing(
    log_ratio_N: np.ndarray, shift: float, floor: float
) -> None:
    log_ratio_N = np.round(log_ratio_N, 3)  # so that the shift itself rounds little
    before, after = (weigh(ratios(x), by_power(ess(floor))) for x in (log_ratio_N, log_ratio_N + shift))
    np.testing.assert_allclose(after.values_N, before.values_N, rtol=1e-6, atol=1e-9)


@PER_EXAMPLE
@given(LOG_RATIOS, st.randoms(use_true_random=False), FLOORS)
def test_order_of_rows_does_not_matter(log_ratio_N: np.ndarray, random: Any, floor: float) -> None:
    order_N = np.array(random.sample(range(len(log_ratio_N)), len(log_ratio_N)))
    before, after = (weigh(ratios(x), by_power(ess(floor))) for x in (log_ratio_N, log_ratio_N[order_N]))
    np.testing.assert_allclose(after.values_N, before.values_N[order_N], rtol=1e-8, atol=1e-12)


@PER_EXAMPLE
@given(LOG_RATIOS, FLOORS)
def test_a_doubled_batch_has_the_same_weights(log_ratio_N: np.ndarray, floor: float) -> None:
    before, after = (weigh(ratios(x), by_power(ess(floor))) for x in (log_ratio_N, np.tile(log_ratio_N, 2)))
    assert after.gamma == pytest.approx(before.gamma, rel=1e-9)
    np.testing.assert_allclose(after.values_N, np.tile(before.values_N, 2), rtol=1e-7, atol=1e-12)


@PER_EXAMPLE
@given(LOG_RATIOS, FLOORS)
def test_a_prior_of_two_is_a_row_twice(log_ratio_N: np.ndarray, floor: float) -> None:
    twice_N = np.concatenate([log_ratio_N, log_ratio_N[:1]])
    prior_N = np.ones(len(log_ratio_N))
    prior_N[0] = 2.0
    once = weigh(ratios(log_ratio_N, prior_N=prior_N), by_power(ess(floor)))
    twice = weigh(ratios(twice_N), by_power(ess(floor)))
    assert once.gamma == pytest.approx(twice.gamma, rel=1e-9)
    n = len(log_ratio_N)
    np.testing.assert_allclose(once.values_N[1:] / n, twice.values_N[1:n] / (n + 1), rtol=1e-7, atol=1e-12)


@PER_EXAMPLE
@given(LOG_RATIOS, st.lists(st.floats(0, 2), min_size=2, max_size=6))
def test_ess_falls_with_gamma(log_ratio_N: np.ndarray, gammas: list[float]) -> None:
    shares = [weigh(ratios(log_ratio_N), by_power(gamma)).ess_ratio for gamma in sorted(gammas)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(shares))


@PER_EXAMPLE
@given(REWARDS, st.lists(st.floats(0.01, 100), min_size=2, max_size=6))
@pytest.mark.parametrize("scheme", ["exponential", "alpha", "first_order"])
def test_ess_falls_with_inverse_beta(scheme: str, rewards_N: np.ndarray, betas: list[float]) -> None:
    shares = [
        weigh(rewarded(rewards_N), by_reward(scheme=scheme, beta=beta)).ess_ratio
        for beta in sorted(betas, reverse=True)
    ]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(shares))


@PER_EXAMPLE
@given(REWARDS, FLOORS)
@pytest.mark.parametrize("scheme", ["exponential", "clipped_exponential", "alpha", "first_order"])
def test_beta_by_ess_holds_its_floor(scheme: str, rewards_N: np.ndarray, floor: float) -> None:
    weights = weigh(rewarded(rewards_N), by_reward(scheme=scheme, beta={"ess": {"floor": floor}}))
    assert np.isfinite(weights.values_N).all()
    assert weights.ess_ratio >= floor - 1e-9
    scaled = weigh(rewarded(rewards_N * 1024), by_reward(scheme=scheme, beta={"ess": {"floor": floor}}))
    if scheme != "clipped_exponential" and weights.bound_by != "none":
        np.testing.assert_allclose(scaled.values_N, weights.values_N, rtol=1e-6, atol=1e-9)


@PER_EXAMPLE
@given(REWARDS, st.floats(-50, 50))
@pytest.mark.parametrize(
    "scheme",
    sorted(
        set(SCHEMES["reward"])
        - {"uniform", "linear", "threshold", "clipped_exponential", "best_of_n", "preference"}
    ),
)
def test_reward_schemes_ignore_a_shift_of_a_group(scheme: str, rewards_N: np.ndarray, shift: float) -> None:
    rewards_N, shift = np.round(rewards_N), float(np.round(shift))
    n = len(rewards_N)
    both_N, group_N = np.concatenate([rewards_N, rewards_N + shift]), np.repeat([0, 1], n)
    values_N = weigh(rewarded(both_N, group_N=group_N), by_reward(scheme=scheme, scope="group")).values_N
    np.testing.assert_allclose(values_N[:n], values_N[n:], rtol=1e-6, atol=1e-6)


@PER_EXAMPLE
@given(REWARDS)
@pytest.mark.parametrize(
    "scheme", sorted(set(SCHEMES["reward"]) - {"uniform", "best_of_n", "linear", "preference"})
)
def test_better_rewards_never_weigh_less(scheme: str, rewards_N: np.ndarray) -> None:
    values_N = weigh(rewarded(rewards_N), by_reward(scheme=scheme, scope="batch")).values_N
    order_N = np.argsort(rewards_N, kind="stable")
    if scheme == "top_k":
        assert (np.diff(values_N[order_N]) >= 0).all()
    assert (np.diff(values_N[order_N]) >= -1e-9).all()


@PER_EXAMPLE
@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1e6)), st.floats(1.01, 20))
def test_cap_keeps_the_mean_the_order_and_the_ratios_below_it(u_N: np.ndarray, cap: float) -> None:
    evidence = rewarded(u_N)
    fields = {"reward": {"scheme": "linear", "scope": "batch"}, "guards": {"cap": cap}}
    weights = weigh(evidence, Weighting.model_validate(fields))
    values_N = weights.values_N
    if not u_N.any():
        return
    assert values_N.mean() == pytest.approx(1.0, abs=1e-9)
    assert values_N.max() <= weights.metrics["cap"] * (1 + 1e-12)
    assert (np.diff(values_N[np.argsort(u_N, kind="stable")]) >= -1e-9).all()
    free_N = (values_N < weights.metrics["cap"] * (1 - 1e-9)) & (u_N > 1e-200)
    if free_N.any():
        scale_N = values_N[free_N] / u_N[free_N]
        np.testing.assert_allclose(scale_N, scale_N[0], rtol=1e-9)


def test_limits() -> None:
    log_ratio_N, rewards_N = np.array([-1.0, 0.0, 2.0]), np.array([0.0, 1.0, 3.0])
    for gamma in (0.0, 1e-12):
        np.testing.assert_allclose(weigh(ratios(log_ratio_N), by_power(gamma)).values_N, 1.0, atol=1e-11)
    flat = weigh(rewarded(rewards_N), by_reward(scheme="exponential", beta=1e12))
    np.testing.assert_allclose(flat.values_N, 1.0, atol=1e-11)
    exponential = weigh(rewarded(rewards_N), by_reward(scheme="exponential", beta=2.0)).values_N
    for alpha, tolerance in ((0.0, 0.0), (1e-3, 1e-2), (1e-6, 1e-5), (1e-9, 1e-6)):
        near = weigh(rewarded(rewards_N), by_reward(scheme="alpha", alpha=alpha, beta=2.0)).values_N
        np.testing.assert_allclose(near, exponential, atol=tolerance + 1e-15)


def test_length_exponent_one_ignores_repetition() -> None:
    # A sequence repeated three times has three times the log ratio and three times the tokens.
    once = Evidence(np.array([-1.0, 0.5]), np.zeros(2), np.array([4, 2]))
    mixed = Evidence(np.array([-3.0, 0.5]), np.zeros(2), np.array([12, 2]))
    np.testing.assert_allclose(weigh(mixed, by_power(0.7)).values_N, weigh(once, by_power(0.7)).values_N)


# What equal rows of one prompt get where it is not one each: exp(-1), as every loss is the median; the
# first of the tied; no advantage; no pair, as nothing is better than anything.
OF_EQUAL_ROWS = {
    "flow": lambda n: np.full(n, math.exp(-1)),
    "raft": lambda n: np.eye(n)[0] * n,
    "grpo": np.zeros,
    "dpo": np.zeros,
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_tiny_and_all_equal_batches(n: int, preset: str) -> None:
    evidence = Evidence(
        log_policy_N=np.full(n, -5.0),
        log_reference_N=np.full(n, -5.0),
        num_tokens_N=np.full(n, 2),
        log_behavior_N=np.full(n, -5.0),
        rewards_N=np.full(n, 0.3),
        group_N=np.zeros(n, np.int64),
    )
    weighting = Weighting.model_validate({"preset": preset})
    if preset == "bon" and n == 1:
        with pytest.raises(NumericsError, match="needs as many rewarded samples"):
            weigh(evidence, weighting)
        return
    expected_N = OF_EQUAL_ROWS.get(preset, np.ones)(n)
    np.testing.assert_allclose(weigh(evidence, weighting).values_N, expected_N, rtol=1e-12)


@PER_EXAMPLE
@given(LOG_RATIOS, st.floats(-500, 500), FLOORS)
def test_a_shift_changes_no_gamma_per_sample(log_ratio_N: np.ndarray, shift: float, floor: float) -> None:
    """gamma_i acts on L_i - mean L: rows of another distance to the start, all L moved by one number."""
    log_ratio_N = np.round(log_ratio_N / 100, 3)
    nll_N = np.linspace(0.5, 6.0, len(log_ratio_N))

    def weighed(log_ratio_N: np.ndarray) -> np.ndarray:
        gamma = {"per_sample": {**ess(floor)["ess"], "distance": "initial_nll"}}
        return weigh(Evidence(log_ratio_N - nll_N, -nll_N, np.ones(len(nll_N))), by_power(gamma)).values_N

    np.testing.assert_allclose(weighed(log_ratio_N + shift), weighed(log_ratio_N), rtol=1e-6, atol=1e-9)


def test_a_gamma_per_sample_is_no_gamma_of_all() -> None:
    """L = (0, 1, 2), d = (1, 2, 3), tau 2: gamma_i = gamma (2/3, 1/2, 2/5), on L - 1 = (-1, 0, 1)."""
    evidence = Evidence(np.array([-1.0, -1.0, -1.0]), np.array([-1.0, -2.0, -3.0]), np.ones(3))
    gamma = {"per_sample": {"floor": 0.34, "max": 0.5, "warmup": 0.0}}
    values_N = weigh(evidence, by_power(gamma)).values_N
    expected_N = np.exp([-1 / 3, 0.0, 1 / 5])
    np.testing.assert_allclose(values_N, expected_N / expected_N.mean(), rtol=1e-12)


@pytest.mark.parametrize("scheme", ["ratio_power", "linear"])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_extreme_log_ratios(scheme: str, gamma: float) -> None:
    evidence = ratios(np.array([-1000.0, 0.0, 999.0, 1000.0]))
    fields = {"likelihood": {"scheme": scheme, "gamma": gamma}, "guards": {"cap": None}}
    values_N = weigh(evidence, Weighting.model_validate(fields)).values_N
    assert np.isfinite(values_N).all()
    power = gamma if scheme == "ratio_power" else 1.0
    assert values_N[3] / values_N[2] == pytest.approx(math.exp(power))


def test_float32_and_integer_inputs() -> None:
    log_ratio_N = np.linspace(-2, 2, 9)
    wide = weigh(ratios(log_ratio_N), by_power(ess(0.5)))
    narrow = weigh(
        Evidence(log_ratio_N.astype(np.float32), np.zeros(9, np.float32), np.ones(9, np.int64)),
        by_power(ess(0.5)),
    )
    assert narrow.values_N.dtype == np.float64
    np.testing.assert_allclose(narrow.values_N, wide.values_N, rtol=1e-6)


def test_a_million_samples() -> None:
    rng = np.random.default_rng(0)
    n = 1_000_000
    evidence = ratios(
        rng.normal(0, 1.5, n), rewards_N=rng.normal(size=n), group_N=np.repeat(np.arange(n // 8), 8)
    )
    fields = {
        "likelihood": {"scheme": "ratio_power", "gamma": ess(0.3, 1.0)},
        "reward": {"scheme": "exponential", "beta": {"ess": {"floor": 0.5}}},
    }
    weights = weigh(evidence, Weighting.model_validate(fields))
    assert weights.values_N.mean() == pytest.approx(1.0, abs=1e-12)
    assert weights.values_N.max() <= 10.0
    assert weights.metrics["ess_ratio_reward"] == pytest.approx(0.5, abs=1e-9)


def bisection(log_ratio_N: np.ndarray, floor: float, most: float) -> float:
    """The usual way: 60 halvings on softmax weights."""
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        u_N = np.exp(middle * log_ratio_N - (middle * log_ratio_N).max())
        low, high = (middle, high) if effective_sample_size(u_N) >= floor * len(u_N) else (low, middle)
    return low


@PER_EXAMPLE
@given(st.integers(0, 10_000), st.floats(0.1, 0.9), st.sampled_from([0.1, 1.0, 3.0, 30.0]))
def test_root_finding_equals_bisection(seed: int, floor: float, scale: float) -> None:
    log_ratio_N = scale * np.random.default_rng(seed).standard_t(5, 200)
    weights = weigh(ratios(log_ratio_N), by_power(ess(floor)))
    if weights.bound_by == "ess":
        assert weights.gamma == pytest.approx(bisection(log_ratio_N, floor, 2.0), abs=1e-9)


def test_the_end_returned_is_always_feasible() -> None:
    # A root finder may stop a rounding error outside the floor; in some of these batches it does.
    base_N = np.full(50, 1 / 50)
    for seed in range(300):
        log_ratio_N = np.random.default_rng(seed).normal(size=50)

        def log_ess(gamma: float, log_ratio_N: np.ndarray = log_ratio_N) -> float:
            return log_conditional_ess(gamma * log_ratio_N, base_N)

        gamma, bound = largest_feasible(log_ess, 0.4, 2.0)
        assert log_ess(gamma) >= math.log(0.4)
        assert not bound or log_ess(gamma * (1 + 1e-12)) < math.log(0.4)


def test_root_finding_takes_a_fifth_of_sixty_halvings() -> None:
    """In passes over a million rows, which is what costs; `tests.bench.weighing` measures the seconds."""
    log_ratio_N = np.random.default_rng(0).normal(0, 1.5, 1_000_000)
    base_N = np.full(len(log_ratio_N), 1 / len(log_ratio_N))
    passes = 0

    def log_ess(gamma: float) -> float:
        nonlocal passes
        passes += 1
        return log_conditional_ess(gamma * log_ratio_N, base_N)

    gamma, bound = largest_feasible(log_ess, 0.3, 1.0)
    assert bound and 5 * passes <= 60
    assert gamma == pytest.approx(bisection(log_ratio_N, 0.3, 1.0), abs=1e-9)
    assert log_ess(gamma) >= math.log(0.3)
