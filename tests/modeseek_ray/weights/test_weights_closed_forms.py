"""The numbers of METHODS.md sections 1 to 4, through the public functions. Each can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from modeseek_ray.errors import NumericsError
from modeseek_ray.types import StepReport
from modeseek_ray.weights import (
    Evidence,
    Weighting,
    best_of_each,
    effective_sample_size,
    first_order_solver,
    observe,
    weigh,
)


def on_ratios(log_ratio: Any, **likelihood: Any) -> tuple[Evidence, Weighting]:
    """Evidence whose log ratio policy/initial is given (T = 1), and a ratio_power weighting of it."""
    log_ratio_N = np.asarray(log_ratio, float)
    n = len(log_ratio_N)
    setting = {"scheme": "ratio_power", **likelihood}
    return Evidence(log_ratio_N, np.zeros(n), np.ones(n)), Weighting.model_validate({"likelihood": setting})


def on_rewards(rewards: Any, group: Any = None, **reward: Any) -> tuple[Evidence, Weighting]:
    rewards_N = np.asarray(rewards, float)
    group_N = None if group is None else np.asarray(group)
    evidence = Evidence(None, None, np.ones(len(rewards_N)), rewards_N=rewards_N, group_N=group_N)
    return evidence, Weighting.model_validate({"reward": reward, "guards": {"cap": None}})


def ess(floor: float, **more: float) -> dict[str, Any]:
    return {"ess": {"floor": floor, "warmup": 0.0, **more}}


class TestGamma:
    def test_ess_floor_on_two_rows_is_ln_3(self) -> None:
        # Weights (1, e^g): (1 + e^g)^2 / 2(1 + e^2g) = .8 has the root e^g = 3.
        weights = weigh(*on_ratios([0, 1], gamma=ess(0.8, max=2.0)))
        assert weights.gamma == pytest.approx(math.log(3), abs=1e-12)
        assert weights.gamma == pytest.approx(math.acosh(1 / (2 * 0.8 - 1)), abs=1e-12)
        assert weights.bound_by == "ess"
        np.testing.assert_allclose(weights.values_N, [0.5, 1.5], rtol=1e-12)
        assert weights.ess_ratio == pytest.approx(0.8, abs=1e-12)

    def test_max_binds_before_the_floor(self) -> None:
        weights = weigh(*on_ratios([0, 1], gamma=ess(0.8, max=1.0)))
        assert (weights.gamma, weights.bound_by) == (1.0, "cap")

    def test_gaussian_log_ratios(self) -> None:
        # ESS/n = exp(-gamma^2 sigma^2): a grid of normal quantiles of deviation 2, floor e^-1 -> gamma = 1/2.
        from scipy.stats import norm

        log_ratio_N = 2.0 * norm.ppf((np.arange(200_000) + 0.5) / 200_000)
        weights = weigh(*on_ratios(log_ratio_N, gamma=ess(math.exp(-1))))
        assert weights.gamma == pytest.approx(0.5, abs=1e-3)

    def test_linear_has_its_own_solve(self) -> None:
        # w = (.5, 1.5): f = (1 - g/2, 1 + g/2), ratio 1 / (1 + g^2/4) = .8 at g = 1.
        evidence, _ = on_ratios(np.log([0.5, 1.5]))
        setting = {"scheme": "linear", "gamma": ess(0.8, max=2.0)}
        weights = weigh(evidence, Weighting.model_validate({"likelihood": setting}))
        assert weights.gamma == pytest.approx(1.0, abs=1e-12)
        np.testing.assert_allclose(weights.values_N, [0.5, 1.5], rtol=1e-12)

    @pytest.mark.parametrize(("slope", "bias", "gamma"), [(0.5, 1.0, 0.75), (2.5, 1.0, 0.0)])
    def test_bias_variance(self, slope: float, bias: float, gamma: float) -> None:
        setting = {"bias_variance": {"bias_squared": bias, "variance_slope": slope}}
        assert weigh(*on_ratios([0, 1], gamma=setting)).gamma == gamma

    @pytest.mark.parametrize("bias", [0.0, -1.0])
    def test_bias_must_be_positive(self, bias: float) -> None:
        with pytest.raises(ValueError, match="bias_squared"):
            on_ratios([0, 1], gamma={"bias_variance": {"bias_squared": bias, "variance_slope": 1.0}})

    @pytest.mark.parametrize(
        ("kind", "at_quarter", "at_half"),
        [("linear", 0.25, 0.5), ("cosine", (1 - math.sqrt(0.5)) / 2, 0.5)],
    )
    def test_schedules(self, kind: str, at_quarter: float, at_half: float) -> None:
        evidence, weighting = on_ratios(
            [0, 1], of="initial", gamma={"schedule": {"kind": kind, "start": 0.0, "end": 1.0}}
        )
        gammas = [weigh(evidence, weighting, progress=p).gamma for p in (0.0, 0.25, 0.5, 1.0)]
        assert gammas == pytest.approx([0.0, at_quarter, at_half, 1.0])

    def test_piecewise_schedule(self) -> None:
        schedule = {"kind": "piecewise", "start": 0.0, "end": 1.0, "points": [[0.5, 0.2]]}
        evidence, weighting = on_ratios([0, 1], of="initial", gamma={"schedule": schedule})
        gammas = [weigh(evidence, weighting, progress=p).gamma for p in (0.25, 0.5, 0.75)]
        assert gammas == pytest.approx([0.1, 0.2, 0.6])

    def test_kl_budget_moves_towards_the_budget(self) -> None:
        # gamma <- clip(gamma + s rate (KL/nats - 1), 0, max): twice the budget moves it by s * rate.
        setting = {"kl_budget": {"nats": 0.1, "rate": 0.2, "start": 0.5, "max": 0.8}}
        for of, after in (("initial_over_policy", 0.7), ("policy_over_initial", 0.3)):
            evidence, weighting = on_ratios([0, 1], of=of, gamma=setting)
            first = weigh(evidence, weighting)
            second = weigh(evidence, weighting, state=observe(first.state, kl_nats=0.2))
            unmeasured = weigh(evidence, weighting, state=second.state)
            assert [first.gamma, second.gamma, unmeasured.gamma] == pytest.approx([0.5, after, after])
        above = weigh(evidence, weighting, state={"kl_gamma": 0.1, "kl_nats": 10.0})
        below = weigh(evidence, weighting, state={"kl_gamma": 0.7, "kl_nats": 0.0})
        assert [above.gamma, below.gamma, below.bound_by] == pytest.approx([0.0, 0.8, "cap"])

    def test_inverse_median_nll(self) -> None:
        # FLOW: gamma = 1 / median NLL; NLL per token (1, 2, 4) -> 1/2, weights exp(-NLL/2) unnormalised.
        evidence = Evidence(None, np.array([-1.0, -4.0, -12.0]), np.array([1, 2, 3]))
        weights = weigh(evidence, Weighting.model_validate({"preset": "flow"}))
        assert weights.gamma == 0.5
        np.testing.assert_allclose(weights.values_N, np.exp([-0.5, -1.0, -2.0]), rtol=1e-14)
        told = weigh(evidence, Weighting(preset="flow"), state=observe({}, median_initial_nll=4.0))
        assert told.gamma == 0.25

    def test_per_sample_gammas(self) -> None:
        # d = (0, 1, 3), tau = median = 1: gamma_i = gamma (1, 1/2, 1/4) on L - mean L = (-2, 0, 2).
        evidence = Evidence(
            np.array([0.0, 2.0, 4.0]), np.zeros(3), np.ones(3), distance_N=np.array([0.0, 1.0, 3.0])
        )
        setting = {"per_sample": {"distance": "kl", "floor": 0.9, "max": 2.0, "warmup": 0.0}}
        weighting = Weighting.model_validate({"likelihood": {"scheme": "ratio_power", "gamma": setting}})
        weights = weigh(evidence, weighting)
        f_N = np.exp(weights.gamma * np.array([-2.0, 0.0, 0.5]))
        np.testing.assert_allclose(weights.values_N, 3 * f_N / f_N.sum(), rtol=1e-12)
        assert weights.ess_ratio == pytest.approx(0.9, abs=1e-9)

    def test_noise_floor_after_the_first_batch(self) -> None:
        evidence, weighting = on_ratios([0.0, 1e-6, -1e-6], gamma=0.5)
        first = weigh(evidence, weighting, progress=0.0)
        assert (first.values_N == 1.0).all()
        assert (first.gamma, first.bound_by) == (0.0, "noise")
        assert first.state["noise_std"] == pytest.approx(1e-6 * math.sqrt(2 / 3))
        still, _ = on_ratios([0.0, 2.9e-6, -2.9e-6])
        assert weigh(still, weighting, progress=0.1, state=first.state).bound_by == "noise"
        moved, _ = on_ratios([0.0, 3.1e-6, -3.1e-6])
        after = weigh(moved, weighting, progress=0.1, state=first.state)
        assert (after.gamma, after.bound_by) == (0.5, "fixed")
        assert after.metrics["L_over_noise"] == pytest.approx(3.1)

    def test_noise_is_measured_before_the_first_step_however_many_rounds_were_skipped(self) -> None:
        """Rounds without a batch move the progress, not the policy: without the floor, ess is at its cap."""
        evidence, weighting = on_ratios([0.0, 1e-6, -1e-6], gamma=ess(0.3))
        begun = observe({}, median_initial_nll=None)  # as a job begins
        first = weigh(evidence, weighting, progress=0.2, state=begun)
        assert (first.gamma, first.bound_by) == (0.0, "noise")
        stepped = observe(first.state, StepReport(0, 1.0, 1.0, 0.5, 1.0, 1e-3, 6))
        larger, _ = on_ratios([0.0, 1e-5, -1e-5])
        assert weigh(larger, weighting, progress=0.4, state=stepped).gamma == 1.0
        late = observe(begun, StepReport(0, 1.0, 1.0, 0.5, 1.0, 1e-3, 6))  # a step, and nothing was measured
        assert "noise_std" not in weigh(evidence, weighting, progress=0.4, state=late).state

    def test_noise_is_measured_where_no_reward_counts(self) -> None:
        ratios, _ = on_ratios([0.0, 1e-6, -1e-6])
        gamma = {"scheme": "ratio_power", "gamma": ess(0.3)}
        rejecting = Weighting.model_validate(
            {"likelihood": gamma, "reward": {"scheme": "threshold", "threshold": 1.0, "scope": "batch"}}
        )
        first = weigh(replace(ratios, rewards_N=np.zeros(3)), rejecting, progress=0.0)
        assert first.state["noise_std"] == pytest.approx(1e-6 * math.sqrt(2 / 3))
        second = weigh(replace(ratios, rewards_N=np.ones(3)), rejecting, progress=0.1, state=first.state)
        assert (second.gamma, second.bound_by) == (0.0, "noise")

    def test_warmup_raises_the_cap(self) -> None:
        evidence, weighting = on_ratios([0, 1], gamma={"ess": {"floor": 0.6, "max": 1.0, "warmup": 0.1}})
        steps = [weigh(evidence, weighting, progress=p) for p in (0.025, 0.05, 0.1)]
        assert [w.gamma for w in steps] == pytest.approx([0.25, 0.5, 1.0])
        assert [w.bound_by for w in steps] == ["warmup", "warmup", "cap"]

    def test_a_floor_below_the_ties_is_flagged(self) -> None:
        # Two of three rows tie at the top: the ratio never falls below 2/3.
        weights = weigh(*on_ratios([0, 5, 5], gamma=ess(0.6, max=2.0)))
        assert weights.bound_by == "cap"
        assert "cannot bind" in weights.warnings[0]


class TestFirstOrder:
    def test_exact_and_first_order(self) -> None:
        # Token ratios 1.1 and 1.2: exact 1.32, first order 1.30; 1.5 and .5: .75 and 1.0.
        log_ratio_N = np.log([1.1 * 1.2, 1.5 * 0.5, 1.0])
        evidence = Evidence(
            log_ratio_N, np.zeros(3), np.array([2, 2, 2]), sum_delta_N=np.array([0.3, 0.0, 0.0])
        )

        def relative(approximation: str) -> np.ndarray:
            setting = {"scheme": "ratio_power", "length_exponent": 0.0, "gamma": 1.0}
            weighting = Weighting.model_validate({"likelihood": {**setting, "approximation": approximation}})
            values_N = weigh(evidence, weighting).values_N
            return values_N / values_N[2]

        np.testing.assert_allclose(relative("exact"), [1.32, 0.75, 1.0], rtol=1e-12)
        np.testing.assert_allclose(relative("first_order"), [1.30, 1.0, 1.0], rtol=1e-12)

    def test_solver_in_feature_space(self) -> None:
        # phi in {0, 4}, r in {0, 1}: Cov(phi) = 4, Cov(phi, r) = 1 -> theta = 1/4.
        solution = first_order_solver(np.array([[0.0], [4.0]]), np.array([0.0, 1.0]), beta=1.0)
        np.testing.assert_allclose(solution.theta_D, [0.25], rtol=1e-5)
        np.testing.assert_allclose(solution.weights_N, [0.5, 1.5], rtol=1e-5)

    def test_ungraded_samples_are_ranked_by_those_that_are(self) -> None:
        # theta = 1/4 from the first prompt; the second, without a grade, is ranked by its features alone.
        solution = first_order_solver(
            np.array([[0.0], [4.0], [1.0], [-9.0], [2.0]]),
            np.array([0.0, 1.0, np.nan, np.nan, np.nan]),
            beta=1.0,
            group_N=np.array([0, 0, 1, 1, 1]),
            ridge=0.0,
        )
        np.testing.assert_allclose(solution.weights_N, [0.5, 1.5, 1.75, -0.75, 2.0])
        assert solution.negative_share == 0.2
        assert best_of_each(solution.weights_N, np.array([0, 0, 1, 1, 1])).tolist() == [1, 4]

    def test_without_any_grade_there_is_nothing_to_solve(self) -> None:
        with pytest.raises(NumericsError, match="no sample has a reward"):
            first_order_solver(np.ones((2, 1)), np.full(2, np.nan), beta=1.0)


class TestRewards:
    def test_beta_of_two_rows(self) -> None:
        weights = weigh(*on_rewards([0, 1], scheme="exponential", beta={"ess": {"floor": 0.8}}))
        assert weights.beta == pytest.approx(1 / math.log(3), abs=1e-12)
        assert weights.beta == pytest.approx(0.910239, abs=1e-6)

    def test_one_beta_for_two_groups(self) -> None:
        setting = {"scheme": "exponential", "beta": {"ess": {"floor": 0.8}}}
        weights = weigh(*on_rewards([0, 1, 0, 5], [0, 0, 1, 1], **setting))
        assert weights.beta == pytest.approx(2.97, abs=0.005)
        assert weights.values_N.reshape(2, 2).mean(1) == pytest.approx([1.0, 1.0])

    @pytest.mark.parametrize(
        "scheme",
        [
            "exponential",
            "alpha",
            "power",
            "advantage",
            "first_order",
            "best_of_n",
            "top_k",
            "signed_advantage",
        ],
    )
    def test_a_shift_of_a_group_changes_nothing(self, scheme: str) -> None:
        values_N = weigh(*on_rewards([0, 1, 10, 11], [0, 0, 1, 1], scheme=scheme)).values_N
        np.testing.assert_allclose(values_N[:2], values_N[2:], rtol=1e-12)

    def test_alpha(self) -> None:
        # alpha 1, beta 2: g = 1 + (r - lambda)/2 with mean one -> lambda = 1/2.
        weights = weigh(*on_rewards([0, 1], scheme="alpha", alpha=1.0, beta=2.0))
        np.testing.assert_allclose(weights.values_N, [0.75, 1.25], rtol=1e-12)

    def test_alpha_with_a_row_at_zero(self) -> None:
        # alpha 1, beta 1/2, r = (0, 1, 2): unclipped lambda = 1 puts row 0 at -1; with it at zero the
        # other two need 1 + 2(r - lambda) to add up to 3: lambda = 5/4, g = (0, 1/2, 5/2).
        weights = weigh(*on_rewards([0, 1, 2], scheme="alpha", alpha=1.0, beta=0.5))
        np.testing.assert_allclose(weights.values_N, [0.0, 0.5, 2.5], atol=1e-12)

    def test_advantage(self) -> None:
        weights = weigh(*on_rewards([0, 0, 0, 1], scheme="advantage"))
        np.testing.assert_allclose(weights.values_N, [0.306082] * 3 + [3.081754], atol=1e-6)
        constant = weigh(*on_rewards([2, 2, 2], scheme="advantage"))
        assert (constant.values_N == 1.0).all()

    def test_advantage_is_clipped_at_20(self) -> None:
        # One success in 101: A = (1 - p)/sqrt(p(1-p)) = 10, e^10 > 20; the others sit at -1/10.
        weights = weigh(*on_rewards([1.0] + [0.0] * 100, scheme="advantage"))
        expected_N = np.array([20.0] + [math.exp(-0.1)] * 100)
        np.testing.assert_allclose(weights.values_N, 101 * expected_N / expected_N.sum(), rtol=1e-6)

    def test_best_of_n(self) -> None:
        # n = 4, N = 2: g = (0, 1/6, 1/3, 1/2).
        weights = weigh(*on_rewards([3, 1, 0, 2], scheme="best_of_n", n=2))
        np.testing.assert_allclose(weights.values_N, [2, 2 / 3, 0, 4 / 3], atol=1e-12)

    def test_best_of_n_shares_ties(self) -> None:
        # Of 4 rows two tie at the top: pairs 6, won by the tied ones in 5 of them -> 5/12 each, 1/6 for the third.
        weights = weigh(*on_rewards([2, 2, 1, 0], scheme="best_of_n", n=2))
        np.testing.assert_allclose(weights.values_N / 4, [5 / 12, 5 / 12, 1 / 6, 0], atol=1e-12)

    def test_best_of_more_than_there_are_is_refused(self) -> None:
        with pytest.raises(Exception, match="best_of_n with n = 3"):
            weigh(*on_rewards([0, 1], scheme="best_of_n", n=3))

    def test_first_order(self) -> None:
        # r = (0, 1, 5), mean 2, beta 2: max(0, 1 + (r - 2)/2) = (0, 1/2, 5/2).
        weights = weigh(*on_rewards([0, 1, 5], scheme="first_order", beta=2.0))
        np.testing.assert_allclose(weights.values_N, [0, 0.5, 2.5], atol=1e-12)

    def test_linear_threshold_power(self) -> None:
        np.testing.assert_allclose(weigh(*on_rewards([0, 1, 2], scheme="linear")).values_N, [0, 1, 2])
        accepted = weigh(*on_rewards([0, 1, 2], scheme="threshold", threshold=1.0)).values_N
        np.testing.assert_allclose(accepted, [0, 1.5, 1.5])
        np.testing.assert_allclose(
            weigh(*on_rewards([1, 2, 3], scheme="power", beta=0.5)).values_N, [0, 0.6, 2.4], rtol=1e-12
        )
        with pytest.raises(Exception, match=r"reward -1 is negative"):
            weigh(*on_rewards([-1, 2], scheme="linear"))

    def test_clipped_exponential(self) -> None:
        weights = weigh(*on_rewards([0, 1, 9], scheme="clipped_exponential", beta=1 / math.log(2), r_max=1.0))
        np.testing.assert_allclose(weights.values_N, [0.6, 1.2, 1.2], rtol=1e-12)

    @pytest.mark.parametrize(
        ("ties", "kept"),
        [("keep_all", [1, 1, 1, 0]), ("first", [1, 1, 0, 0]), ("none", [1, 0, 0, 0])],
    )
    def test_top_k_ties(self, ties: str, kept: list[int]) -> None:
        weights = weigh(*on_rewards([9, 5, 5, 1], scheme="top_k", share=0.5, ties=ties))
        np.testing.assert_allclose(weights.values_N, 4 * np.array(kept) / sum(kept))

    def test_top_k_rounds_up_but_not_for_rounding_errors(self) -> None:
        # ceil(.3 * 10 - 1e-9) = 3 although .3 * 10 may be 3.0000000000000004 in other orders; ceil(.31 * 10) = 4.
        for share, kept in ((0.3, 3), (0.31, 4), (0.1 + 0.2, 3)):
            weights = weigh(*on_rewards(np.arange(10.0), scheme="top_k", share=share))
            assert np.count_nonzero(weights.values_N) == kept

    def test_signed_advantage(self) -> None:
        raw = weigh(*on_rewards([0, 0, 0, 1], scheme="signed_advantage", divide_by_std=False))
        np.testing.assert_allclose(raw.values_N, [-0.25, -0.25, -0.25, 0.75])
        scaled = weigh(*on_rewards([0, 0, 0, 1], scheme="signed_advantage"))
        np.testing.assert_allclose(scaled.values_N, raw.values_N / (math.sqrt(3) / 4), rtol=1e-6)

    def test_ties_at_the_top_bound_the_ratio(self) -> None:
        # 2 of 4 tie: as beta -> 0 the ratio goes to 1/2; a floor of .4 never binds and that is said.
        weights = weigh(*on_rewards([0, 0, 1, 1], scheme="exponential", beta={"ess": {"floor": 0.4}}))
        assert weights.ess_ratio == pytest.approx(0.5)
        assert "cannot bind" in weights.warnings[0]

    def test_constant_rewards_are_uniform_and_said(self) -> None:
        for scheme in ("exponential", "alpha", "power", "advantage", "first_order", "top_k"):
            weights = weigh(*on_rewards([3, 3, 3], scheme=scheme))
            assert (weights.values_N == 1.0).all(), scheme
            assert any("ties" in warning for warning in weights.warnings)

    def test_a_group_of_zeros_is_skipped_and_counted(self) -> None:
        weights = weigh(*on_rewards([0, 0, 0, 1], [0, 0, 1, 1], scheme="threshold"))
        np.testing.assert_allclose(weights.values_N, [0, 0, 0, 4])
        assert weights.metrics["skipped_groups"] == 1

    def test_rounds_at_k_beta_equal_one_round_at_beta(self) -> None:
        # Variational fitting on outcomes: pi <- pi * e^{r/(K beta)}, normalised, K times.
        policy_N, rewards_N = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])

        def fitted(start_N: np.ndarray, beta: float) -> np.ndarray:
            evidence = Evidence(None, None, np.ones(3), rewards_N=rewards_N, prior_N=start_N)
            setting = {"reward": {"scheme": "exponential", "beta": beta}, "guards": {"cap": None}}
            return weigh(evidence, Weighting.model_validate(setting)).values_N / 3

        rounds_N = policy_N
        for _ in range(4):
            rounds_N = fitted(rounds_N, 4 * 0.7)
        np.testing.assert_allclose(rounds_N, fitted(policy_N, 0.7), rtol=1e-12)


class TestFrame:
    def test_plain_sft_is_exactly_one(self) -> None:
        for n in (1, 2, 3, 7, 1000, 4097):
            evidence = Evidence(np.full(n, -3.3), np.full(n, -3.3), np.full(n, 3), row_N=np.arange(n))
            for setting in (
                {},
                {"preset": "mode_seeking"},
                {"likelihood": {"scheme": "ratio_power", "gamma": 0.7}},
                {"likelihood": {"scheme": "linear", "gamma": 0.7}, "guards": {"mix": 0.1}},
            ):
                assert (weigh(evidence, Weighting.model_validate(setting)).values_N == 1.0).all()

    def test_cap_example(self) -> None:
        # u = (8, 1, 1) x 3/10 under C = 2: s makes the others 1/2: (2, .5, .5), mean one.
        evidence = Evidence(None, None, np.ones(3), rewards_N=np.array([8.0, 1.0, 1.0]))
        weighting = Weighting.model_validate({"reward": {"scheme": "linear"}, "guards": {"cap": 2.0}})
        np.testing.assert_allclose(weigh(evidence, weighting).values_N, [2, 0.5, 0.5], rtol=1e-12)

    def test_cap_among_the_smallest_doubles(self) -> None:
        """The row at the cap leaves 1 for two rows of 2e-313: half each, though 1/4e-313 is no double."""
        evidence = Evidence(None, None, np.ones(3), rewards_N=np.array([1.0, 2e-313, 2e-313]))
        weighting = Weighting.model_validate({"reward": {"scheme": "linear"}, "guards": {"cap": 2.0}})
        assert weigh(evidence, weighting).values_N == pytest.approx([2.0, 0.5, 0.5])

    def test_cap_is_raised_when_too_few_rows_are_positive(self) -> None:
        evidence = Evidence(None, None, np.ones(4), rewards_N=np.array([3.0, 1.0, 0, 0]))
        weighting = Weighting.model_validate({"reward": {"scheme": "linear"}, "guards": {"cap": 1.5}})
        weights = weigh(evidence, weighting)
        np.testing.assert_allclose(weights.values_N, [2, 2, 0, 0])
        assert "cap 1.5 was raised to 2" in weights.warnings[0]
        assert weights.metrics["cap_bound_share"] == 0.5

    def test_iw_sft_is_the_clipped_ratio_itself(self) -> None:
        # Per-token ratios 2 and 32: unnormalised, clipped at 16.
        evidence = Evidence(np.log([4.0, 32.0]), np.zeros(2), np.array([2, 1]))
        np.testing.assert_allclose(weigh(evidence, Weighting(preset="iw_sft")).values_N, [2.0, 16.0])

    def test_effective_sample_size(self) -> None:
        assert effective_sample_size(np.array([1.0, 1.0, 0.0, 0.0])) == 2.0
        assert effective_sample_size(np.array([3.0, 1.0])) == pytest.approx(1.6)
        assert effective_sample_size(np.array([1e300, 1e300])) == 2.0
        assert effective_sample_size(np.zeros(3)) == 0.0
