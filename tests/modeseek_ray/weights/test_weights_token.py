"""What token factors take from the batch as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.parameters import factor_parameters
from modeseek_ray.weights import Evidence, Weighting, weigh

TALR = Weighting(preset="talr")
# Mean losses of 1, 2 and 9 nats a token: the median is 2, whatever the lengths.
BATCH = Evidence(np.array([-2.0, -4.0, -90.0]), None, np.array([2, 2, 10]))


def test_talr_s_tau_is_the_median_of_the_samples_mean_losses() -> None:
    weights = weigh(BATCH, TALR)
    assert weights.token_parameters == {"tau": 2.0}
    assert weights.metrics["token_tau"] == 2.0
    assert weights.values_N.tolist() == [1.0, 1.0, 1.0]
    assert factor_parameters(TALR.token) == {"floor": 0.01}


def test_a_tau_that_is_given_is_not_measured() -> None:
    given = Weighting.model_validate({"preset": "talr", "token": {"tau": 1.5}})
    assert weigh(Evidence(None, None, np.ones(2)), given).token_parameters == {}
    assert factor_parameters(given.token) == {"floor": 0.01, "tau": 1.5}


def test_a_batch_known_by_heart_has_a_tau_above_zero() -> None:
    assert weigh(Evidence(np.zeros(2), None, np.ones(2)), TALR).token_parameters["tau"] > 0


def test_without_the_policy_s_scores_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="log_policy_N"):
        weigh(Evidence(None, None, np.ones(2)), TALR)
