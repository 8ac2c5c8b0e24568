"""The order of operations, against a second computation written out step by step in plain loops.

Nothing here calls the product's own pieces: only `weigh` is compared with it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from modeseek_ray.errors import ConfigError, NumericsError
from modeseek_ray.weights import Evidence, Weighting, weigh

NAN = math.nan

# Two prompts of four samples, one prompt whose rewards all lie far below, a row without a reward, replay.
GROUP = [0, 0, 0, 0, 1, 1, 1, 1, 2, 3]
REWARD = [0.0, 1.0, 2.0, 0.5, 10.0, 12.0, 11.0, 10.0, NAN, NAN]
PRIOR = [1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 3.0, 0.0, 1.5, 0.7]
LOG_RATIO = [0.1, -0.4, 0.9, 0.0, 2.0, -1.0, 0.3, 5.0, 9.0, -9.0]
TOKENS = [1, 2, 1, 3, 2, 2, 1, 4, 2, 5]
REPLAY = [False] * 9 + [True]


def evidence(rewards: list[float] = REWARD) -> Evidence:
    return Evidence(
        log_policy_N=np.array(LOG_RATIO) * np.array(TOKENS) - 7.0,
        log_reference_N=np.full(10, -7.0),
        num_tokens_N=np.array(TOKENS),
        rewards_N=np.array(rewards),
        group_N=np.array(GROUP),
        prior_N=np.array(PRIOR),
        is_replay_N=np.array(REPLAY),
    )


def weighting(cap: float | None, mix: float, floors: tuple[float, float]) -> Weighting:
    return Weighting.model_validate(
        {
            "likelihood": {
                "scheme": "ratio_power",
                "gamma": {"ess": {"floor": floors[0], "max": 2.0, "warmup": 0.0}},
            },
            "reward": {"scheme": "exponential", "beta": {"ess": {"floor": floors[1]}}, "scope": "group"},
            "guards": {"cap": cap, "mix": mix},
        }
    )


def bisect(holds: Any, high: float) -> float:
    """Largest x in [0, high] for which `holds`, by 200 halvings."""
    low = 0.0
    if holds(high):
        return high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def by_hand(cap: float | None, mix: float, floors: tuple[float, float]) -> tuple[list[float], float, float]:
    """METHODS.md section 1, steps 1 to 7, row by row. Returns v, gamma, beta."""
    n = len(GROUP)
    new = [i for i in range(n) if not REPLAY[i] and not math.isnan(REWARD[i])]

    def grouped(inverse_beta: float) -> dict[int, float]:
        g = {i: math.exp(REWARD[i] * inverse_beta) for i in new}
        means = {
            p: sum(PRIOR[i] * g[i] for i in new if GROUP[i] == p)
            / sum(PRIOR[i] for i in new if GROUP[i] == p)
            for p in {GROUP[i] for i in new}
        }
        return {i: g[i] / means[GROUP[i]] for i in new}

    def ratio(base: dict[int, float], u: dict[int, float]) -> float:
        total = sum(base.values())
        mean = sum(base[i] * u[i] for i in new) / total
        return mean**2 / (sum(base[i] * u[i] ** 2 for i in new) / total)

    a = {i: PRIOR[i] for i in new}
    inverse_beta = bisect(lambda t: ratio(a, grouped(t)) >= floors[1], 20.0)  # 1
    g = grouped(inverse_beta)  # 2
    b = {i: a[i] * g[i] for i in new}
    gamma = bisect(lambda x: ratio(b, {i: math.exp(x * LOG_RATIO[i]) for i in new}) >= floors[0], 2.0)  # 3
    f = {i: math.exp(gamma * LOG_RATIO[i]) for i in new}
    mean = sum(b[i] * f[i] for i in new) / sum(b.values())
    f = {i: f[i] / mean for i in new}  # 4
    f = {i: (1 - mix) * f[i] + mix for i in new}  # 5
    u = {i: a[i] * f[i] * g[i] for i in new}
    scale = sum(a.values()) / sum(u.values())
    v = [n * (u[i] * scale if i in u else PRIOR[i]) / sum(PRIOR) for i in range(n)]  # 6
    if cap is not None:  # 7, on new rows, keeping their sum
        total = sum(v[i] for i in new)
        # The scale has no upper end known beforehand: with s this large every positive row sits at the cap.
        s = bisect(lambda s: sum(min(cap, s * v[i]) for i in new) <= total, 1e4)
        for i in new:
            v[i] = min(cap, s * v[i])
    return v, gamma, 1 / inverse_beta


@pytest.mark.parametrize("cap", [None, 10.0, 2.5, 1.5])
@pytest.mark.parametrize("mix", [0.0, 0.1])
@pytest.mark.parametrize("floors", [(0.6, 0.7), (0.3, 0.9), (0.9, 0.5)])
def test_both_floors_mix_cap_priors_replay(
    cap: float | None, mix: float, floors: tuple[float, float]
) -> None:
    weights = weigh(evidence(), weighting(cap, mix, floors))
    values, gamma, beta = by_hand(cap, mix, floors)
    assert weights.gamma == pytest.approx(gamma, abs=1e-9)
    assert weights.beta == pytest.approx(beta, rel=1e-9)
    np.testing.assert_allclose(weights.values_N, values, rtol=1e-9, atol=1e-12)
    assert weights.values_N.mean() == pytest.approx(1.0, abs=1e-12)
    new_N = weights.values_N[:8]
    assert weights.ess_ratio == pytest.approx(new_N.sum() ** 2 / (8 * (new_N**2).sum()), rel=1e-12)
    assert weights.metrics["ess_ratio_likelihood"] >= floors[0] - 1e-12
    assert weights.metrics["ess_ratio_reward"] >= floors[1] - 1e-12


def test_rejected_rows_do_not_steer_gamma() -> None:
    setting = {
        "likelihood": {
            "scheme": "ratio_power",
            "gamma": {"ess": {"floor": 0.8, "max": 2.0, "warmup": 0.0}},
        },
        "reward": {"scheme": "threshold", "threshold": 1.0, "scope": "batch"},
        "guards": {"mix": 0.2},
    }
    ratio_N = np.array([0.0, 1.0, 50.0, -30.0])
    rewards_N = np.array([1.0, 1.0, 0.0, 0.0])
    weights = weigh(
        Evidence(ratio_N, np.zeros(4), np.ones(4), rewards_N=rewards_N), Weighting.model_validate(setting)
    )
    assert weights.gamma == pytest.approx(math.log(3), abs=1e-12)
    # f = (.5, 1.5) mixed to (.6, 1.4); the rejected rows stay at zero although mix is .2.
    np.testing.assert_allclose(weights.values_N, [1.2, 2.8, 0.0, 0.0], rtol=1e-12)


def test_replay_keeps_its_share_whatever_the_weights() -> None:
    # Priors 1 for four new rows and 2 for two replay rows: replay always has 4/8 of the batch's 6.
    ratio_N = np.array([0.0, 1.0, 2.0, 3.0, 100.0, NAN])
    replay_N = np.array([False] * 4 + [True] * 2)
    prior_N = np.array([1.0] * 4 + [2.0] * 2)
    for gamma in (0.0, 0.5, 2.0):
        for cap in (None, 1.2):
            setting = {"likelihood": {"scheme": "ratio_power", "gamma": gamma}, "guards": {"cap": cap}}
            weights = weigh(
                Evidence(ratio_N, np.zeros(6), np.ones(6), prior_N=prior_N, is_replay_N=replay_N),
                Weighting.model_validate(setting),
            )
            np.testing.assert_allclose(weights.values_N[4:], [1.5, 1.5])
            assert weights.values_N[:4].sum() == pytest.approx(3.0)


def test_a_row_of_zero_prior_stays_zero_and_steers_nothing() -> None:
    setting = {
        "likelihood": {"scheme": "ratio_power", "gamma": {"ess": {"floor": 0.8, "max": 2, "warmup": 0}}}
    }
    weights = weigh(
        Evidence(np.array([0.0, 1.0, 99.0]), np.zeros(3), np.ones(3), prior_N=np.array([1.0, 1.0, 0.0])),
        Weighting.model_validate(setting),
    )
    assert weights.gamma == pytest.approx(math.log(3))
    np.testing.assert_allclose(weights.values_N, [0.75, 2.25, 0.0])


def test_replay_alone_is_ordinary_training() -> None:
    weights = weigh(Evidence(None, None, np.ones(2), rewards_N=np.array([NAN, NAN])), Weighting(preset="rwr"))
    assert (weights.values_N == 1.0).all()


def test_unnormalised_weights_are_the_product_itself() -> None:
    setting = {
        "likelihood": {"scheme": "ratio_power", "gamma": 0.5},
        "reward": {"scheme": "linear"},
        "normalise": False,
    }
    weights = weigh(
        Evidence(
            np.log([4.0, 9.0]),
            np.zeros(2),
            np.ones(2),
            rewards_N=np.array([1.0, 2.0]),
            prior_N=np.array([1.0, 0.5]),
        ),
        Weighting.model_validate(setting),
    )
    np.testing.assert_allclose(weights.values_N, [2.0, 3.0], rtol=1e-14)


def test_nothing_handed_in_is_changed() -> None:
    given, state = evidence(), {"noise_std": 0.0, "ledger": {"1": 0.5}}
    before = {name: np.array(column) for name, column in vars(given).items() if column is not None}
    weigh(given, weighting(2.0, 0.1, (0.5, 0.5)), state=state)
    assert state == {"noise_std": 0.0, "ledger": {"1": 0.5}}
    for name, column in before.items():
        np.testing.assert_array_equal(getattr(given, name), column)


def test_moving_average_of_the_log_ratio() -> None:
    # Kept share .75: second visit of row 7 sees .75 * 0 + .25 * 4 = 1, of row 8 it sees 0.
    setting = {"likelihood": {"scheme": "ratio_power", "gamma": 1.0}, "guards": {"moving_average": 0.75}}
    chosen = Weighting.model_validate(setting)
    first = weigh(Evidence(np.zeros(2), np.zeros(2), np.ones(2), row_N=np.array([7, 8])), chosen)
    again = Evidence(np.array([0.0, 4.0]), np.zeros(2), np.ones(2), row_N=np.array([8, 7]))
    second = weigh(again, chosen, state=first.state)
    np.testing.assert_allclose(second.values_N[1] / second.values_N[0], math.e, rtol=1e-12)


def test_the_ledger_counts_rows_that_starve() -> None:
    chosen = Weighting.model_validate({"reward": {"scheme": "linear", "scope": "batch"}})
    state: Any = None
    for rewards, starved in (([0.0, 1.0], 0.5), ([0.01, 1.0], 0.5), ([1.0, 1.0], 0.0)):
        weights = weigh(
            Evidence(None, None, np.ones(2), rewards_N=np.array(rewards), row_N=np.array([3, 4])),
            chosen,
            state=state,
        )
        state = weights.state
        assert weights.metrics["starved_share"] == starved


@pytest.mark.parametrize("bad", [NAN, -math.inf, math.inf])
@pytest.mark.parametrize("column", ["log_policy_N", "log_reference_N"])
def test_impossible_log_probabilities_name_the_row(bad: float, column: str) -> None:
    columns: dict[str, Any] = {"log_policy_N": np.zeros(3), "log_reference_N": np.zeros(3)}
    columns[column] = np.array([0.0, bad, 0.0])
    with pytest.raises(NumericsError, match=f"row 42: {column}"):
        weigh(
            Evidence(**columns, num_tokens_N=np.ones(3), row_N=np.array([41, 42, 43])),
            Weighting(preset="mode_seeking"),
        )


def test_missing_evidence_is_named_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"log_behavior_N.*behavior_model"):
        weigh(
            Evidence(np.zeros(2), np.zeros(2), np.ones(2)),
            Weighting.model_validate({"likelihood": {"scheme": "ratio_power", "of": "policy_over_data"}}),
        )
    with pytest.raises(ConfigError, match=r"rewards_N"):
        weigh(Evidence(None, None, np.ones(2)), Weighting(preset="rwr"))


@pytest.mark.parametrize("prior", [[1.0, -1.0], [1.0, NAN], [0.0, 0.0]])
def test_impossible_priors(prior: list[float]) -> None:
    with pytest.raises(NumericsError, match="prior"):
        weigh(Evidence(None, None, np.ones(2), prior_N=np.array(prior)), Weighting())
