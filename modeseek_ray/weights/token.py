"""Parameters of token factors that are a figure of the whole batch: measured here, where all of it is known.

A trainer rank sees a part of the batch, cut into micro-batches: a median taken there would depend on
how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.parameters import Talr
from modeseek_ray.types import Evidence
from modeseek_ray.weights.weighting import Weighting

SMALLEST_TAU = 1e-6  # nats: of a batch that is known by heart


def token_parameters(evidence: Evidence, weighting: Weighting) -> Mapping[str, float]:
    """What the token factor takes from this batch; nothing for most. Raises `ConfigError` without log pi.

    >>> batch = Evidence(np.array([-2.0, -4.0, -90.0]), None, np.array([2, 2, 10]))  # 1, 2 and 9 nats a token
    >>> token_parameters(batch, Weighting.model_validate({"token": {"scheme": "talr"}}))
    {'tau': 2.0}
    """
    factor = weighting.token
    if not isinstance(factor, Talr) or factor.tau is not None:
        return {}
    if evidence.log_policy_N is None:
        raise ConfigError(
            "talr measures its tau on the batch, which has no log_policy_N.",
            mend="Score the batch with the policy first, or set tau.",
            param="method.weighted.token.tau",
        )
    nll_N = -np.asarray(evidence.log_policy_N, np.float64) / np.asarray(evidence.num_tokens_N, np.float64)
    return {"tau": max(float(np.median(nll_N)), SMALLEST_TAU)}
