"""The fixed points of METHODS.md section 2, reached by a tabular policy trained through `weigh`.

One prompt, three outcomes, all enumerated: row i is outcome i with prior a = mu_i. The loss
-sum_i v_i log pi_i / n has the gradient pi - v/n with respect to the logits (softmax's), so plain
gradient steps end where the weights agree with the policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modeseek_ray.weights import Evidence, Weighting, weigh

MU = np.array([0.5, 0.3, 0.2])
START = np.array([0.7, 0.2, 0.1])


def trained(likelihood: dict[str, Any], *, data_model: np.ndarray = MU, steps: int = 600) -> np.ndarray:
    """pi after plain gradient steps of rate 1 from the start, weights taken anew at each."""
    weighting = Weighting.model_validate({"likelihood": likelihood, "guards": {"cap": None}})
    logits_N = np.log(START)
    for _ in range(steps):
        policy_N = np.exp(logits_N - np.logaddexp.reduce(logits_N))
        evidence = Evidence(
            log_policy_N=np.log(policy_N),
            log_reference_N=np.log(START),
            num_tokens_N=np.ones(3),
            log_behavior_N=np.log(data_model),
            prior_N=MU,
        )
        values_N = weigh(evidence, weighting).values_N
        gradient_N = values_N.sum() / 3 * policy_N - values_N / 3
        logits_N = logits_N - gradient_N
    return policy_N


def normal(x_N: np.ndarray) -> np.ndarray:
    return x_N / x_N.sum()


@pytest.mark.parametrize(
    ("of", "gamma", "printed", "closed_form"),
    [
        ("policy_over_initial", 0.5, (0.295858, 0.372781, 0.331361), (MU * START**-0.5) ** 2),
        ("policy_over_data", 0.5, (0.5, 0.3, 0.2), MU),
        ("policy", 0.5, (0.657895, 0.236842, 0.105263), MU**2),
        ("initial", 0.5, (0.679394, 0.217891, 0.102715), MU * START**0.5),
        ("initial_over_policy", 1.0, (0.604930, 0.250465, 0.144606), (MU * START) ** 0.5),
        ("initial_over_policy", 0.5, None, (MU * START**0.5) ** (1 / 1.5)),
    ],
)
def test_ratio_powers(of: str, gamma: float, printed: Any, closed_form: np.ndarray) -> None:
    reached_N = trained({"scheme": "ratio_power", "of": of, "gamma": gamma, "length_exponent": 0.0})
    np.testing.assert_allclose(reached_N, normal(closed_form), atol=1e-9)
    if printed is not None:
        np.testing.assert_allclose(reached_N, printed, atol=1e-6)


REWARDS = np.array([0.0, 1.0, 2.0])


def fitted(began_N: np.ndarray, beta: float, rounds: int = 2) -> np.ndarray:
    """Where exact fits of one round end: rows are mu's, weighed by (pi_k / mu) e^(r / beta)."""
    setting = {"preset": "iterative", "reward": {"beta": beta}, "rounds": rounds, "guards": {"cap": None}}
    evidence = Evidence(
        log_policy_N=None,
        log_reference_N=np.log(START),
        num_tokens_N=np.array([1, 5, 9]),  # length_exponent 0: the sequence's own ratio
        log_behavior_N=np.log(MU),
        rewards_N=REWARDS,
        prior_N=MU,
        group_N=np.zeros(3, int),
        log_round_N=np.log(began_N) if rounds > 1 else None,
    )
    return normal(weigh(evidence, Weighting.model_validate(setting)).values_N)


def test_a_round_of_iterative_tilts_the_policy_it_began_with() -> None:
    began_N = np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(fitted(began_N, 0.7), normal(began_N * np.exp(REWARDS / 0.7)), rtol=1e-12)


def test_the_first_round_of_iterative_begins_at_the_start() -> None:
    np.testing.assert_allclose(fitted(START, 0.7, rounds=1), fitted(START, 0.7), rtol=1e-12)


@pytest.mark.parametrize("betas", [[2.8] * 4, [1.0, 7 / 3]])
def test_only_the_sum_of_inverse_betas_matters(betas: list[float]) -> None:
    """1/.7 = 4/2.8 = 1 + 3/7: rounds at K beta equal one at beta, whatever the data were sampled from."""
    policy_N = START
    for beta in betas:
        policy_N = fitted(policy_N, beta)
    np.testing.assert_allclose(policy_N, normal(START * np.exp(REWARDS / 0.7)), rtol=1e-12)


@pytest.mark.parametrize("betas", [[2.8] * 4, [7 / 3, 1.0], [0.7]])
def test_a_beta_for_each_round(betas: list[float]) -> None:
    """The same as a list in one job of three steps a round, whose progress says which round it is."""
    rounds = len(betas)
    weighting = Weighting.model_validate(
        {
            "preset": "iterative",
            "rounds": rounds,
            "reward": {"beta": betas},
            "guards": {"cap": None},
        }
    )
    policy_N, used = START, []
    for step in range(3 * rounds):
        if step % 3 == 0:
            began_N = policy_N
        evidence = Evidence(
            None,
            np.log(START),
            np.ones(3),
            np.log(MU),
            REWARDS,
            np.zeros(3, int),
            prior_N=MU,
            log_round_N=np.log(began_N),
        )
        weights = weigh(evidence, weighting, progress=step / (3 * rounds))
        used.append(weights.beta)
        policy_N = normal(weights.values_N)
    assert used == [beta for beta in betas for _ in range(3)]
    np.testing.assert_allclose(policy_N, normal(START * np.exp(REWARDS / 0.7)), rtol=1e-12)


def test_with_the_live_policy_in_its_place_it_collapses_to_the_best() -> None:
    likelihood = {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 1.0}
    setting = {"likelihood": likelihood, "reward": {"scheme": "exponential"}, "guards": {"cap": None}}
    policy_N = START
    for _ in range(60):
        evidence = Evidence(
            np.log(policy_N), None, np.ones(3), np.log(MU), REWARDS, np.zeros(3, int), prior_N=MU
        )
        policy_N = normal(weigh(evidence, Weighting.model_validate(setting)).values_N)
    np.testing.assert_allclose(policy_N, [0.0, 0.0, 1.0], atol=1e-12)


def test_plain_sft_reaches_the_data() -> None:
    np.testing.assert_allclose(trained({"scheme": "uniform"}), MU, atol=1e-9)


def test_policy_over_data_with_another_model_of_the_data() -> None:
    other_N = np.array([0.2, 0.2, 0.6])
    reached_N = trained({"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.3}, data_model=other_N)
    np.testing.assert_allclose(reached_N, normal((MU * other_N**-0.3) ** (1 / 0.7)), atol=1e-9)


def test_self_normalisation_biases_sampled_batches() -> None:
    # Over all count vectors of n = 64 draws from mu (a multinomial), the policy at which the expected
    # normalised weight of each outcome is its probability: METHODS prints it for row 1 of the table.
    from scipy.stats import multinomial

    n = 64
    counts_CN = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)])
    chance_C = multinomial(n, MU).pmf(counts_CN)
    weighting = Weighting.model_validate(
        {"likelihood": {"scheme": "ratio_power", "gamma": 0.5}, "guards": {"cap": None}}
    )
    policy_N = np.array([0.301341, 0.372069, 0.326590])
    share_N = np.zeros(3)
    for counts_N, chance in zip(counts_CN, chance_C, strict=True):
        evidence = Evidence(np.log(policy_N), np.log(START), np.ones(3), prior_N=counts_N)
        share_N += chance * weigh(evidence, weighting).values_N / 3
    np.testing.assert_allclose(share_N, policy_N, atol=1e-6)
