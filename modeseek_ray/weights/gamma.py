"""Every way to choose gamma, and beta: what the user may write under `gamma:` and `beta:`.

How the numbers are then found is `control.py`'s business.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from modeseek_ray.strict import TAG_PREFIX, ConfiguredAs, Pair, Strict

GAMMA_LIMIT = 2.0  # for ratios that contain the policy, and for those of METHODS.md that are not static


class Ess(Strict):
    """The largest gamma that keeps the effective sample size above a floor."""

    floor: float = Field(0.3, gt=0, lt=1)
    """Smallest conditional ESS, as a share of the batch; 0.2 to 0.5 is recommended."""
    max: float = Field(1.0, gt=0, le=1e6)
    """Cap on gamma."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the job over which the cap rises linearly from 0; 0 = no warm-up."""


class Schedule(Strict):
    """Gamma as a function of progress: small early, larger later."""

    kind: Literal["linear", "cosine", "piecewise"] = "linear"
    start: float = Field(0.0, ge=0)
    """Gamma at progress 0."""
    end: float = Field(0.5, ge=0)
    """Gamma at progress 1."""
    points: list[Pair] | None = None
    """`piecewise` only: (progress, gamma) pairs between start and end, by increasing progress."""

    @model_validator(mode="after")
    def _points_fit_kind(self) -> Schedule:
        if (self.kind == "piecewise") != (self.points is not None):
            raise ValueError("points belong to kind: piecewise, and only there")
        knots = [at for at, _ in self.points or []]
        if any(not 0 < at < 1 for at in knots) or any(b <= a for a, b in itertools.pairwise(knots)):
            raise ValueError("points need increasing progress strictly between 0 and 1")
        if any(gamma < 0 for _, gamma in self.points or []):
            raise ValueError("gamma must not be negative")
        return self


class PerSample(Ess):
    """gamma_i = gamma / (1 + d_i / scale): larger near the start. One gamma for all meets the ESS floor."""

    distance: Literal["initial_nll", "kl"] = "initial_nll"
    """d_i: the sample's mean NLL per token under the start, or KL(pi_0 || pi) on its trained tokens, measured by
    the trainer (one more forward pass, and pi_0 beside the policy)."""
    scale: float | None = Field(None, gt=0)
    """tau, in the distance's unit (nats); None = the batch's median distance."""


class BiasVariance(Strict):
    """gamma* = max(0, 1 - sigma^2 / (2 delta)), the minimiser of delta (1 - gamma)^2 + sigma^2 gamma."""

    bias_squared: float = Field(gt=0)
    """delta: squared bias at gamma = 0, in loss units."""
    variance_slope: float = Field(ge=0)
    """sigma^2: growth of the variance per unit of gamma, in the same loss units."""


class KlBudget(Strict):
    """gamma moves by rate x (KL/nats - 1) per measured forward KL to the start, towards the budget."""

    nats: float = Field(gt=0)
    """The budget: forward KL to the start per trained token."""
    rate: float = Field(0.1, gt=0, le=10)
    start: float = Field(0.0, ge=0)
    """Gamma before the first measurement."""
    max: float = Field(1.0, gt=0)


class InverseMedianNll(Strict):
    """gamma = 1 / median over the data set of the mean NLL per token under the start (FLOW)."""

    median_nats: float | None = Field(None, gt=0)
    """The median, if known; None = measured by the job over its data set (online: over each batch)."""


class EssGamma(Strict):
    """`{ess: ...}`"""

    ess: Ess


class ScheduleGamma(Strict):
    """`{schedule: ...}`"""

    schedule: Schedule


class PerSampleGamma(Strict):
    """`{per_sample: ...}`"""

    per_sample: PerSample


class BiasVarianceGamma(Strict):
    """`{bias_variance: ...}`"""

    bias_variance: BiasVariance


class KlBudgetGamma(Strict):
    """`{kl_budget: ...}`"""

    kl_budget: KlBudget


class InverseMedianNllGamma(Strict):
    """`{inverse_median_nll: {}}`"""

    inverse_median_nll: InverseMedianNll


class BetaEss(Strict):
    """The smallest beta (the sharpest weights) that keeps the effective sample size above a floor."""

    floor: float = Field(0.3, gt=0, lt=1)
    """Smallest ESS of the reward weights, as a share of the batch."""


class EssBeta(Strict):
    """`{ess: ...}`"""

    ess: BetaEss


def _kind(value: Any) -> str:
    """The tag of a setting: `number`, `list`, or the one key of the object."""
    if isinstance(value, Strict):
        return TAG_PREFIX + next(iter(type(value).model_fields))
    if isinstance(value, list):
        return TAG_PREFIX + "list"
    if isinstance(value, dict):
        return TAG_PREFIX + (str(next(iter(value))) if len(value) == 1 else "?")
    return TAG_PREFIX + "number"


def _tagged(name: str, kind: Any) -> Any:
    return Annotated[kind, Tag(TAG_PREFIX + name)]


def _choice(name: str, ways: str) -> Any:
    message = f"{name} must be a number, or an object with exactly one of: {ways}"
    return Discriminator(_kind, custom_error_type="unknown_setting", custom_error_message=message)


GammaSetting: Any = Annotated[
    _tagged("number", Annotated[float, Field(ge=0)])
    | _tagged("ess", EssGamma)
    | _tagged("schedule", ScheduleGamma)
    | _tagged("per_sample", PerSampleGamma)
    | _tagged("bias_variance", BiasVarianceGamma)
    | _tagged("kl_budget", KlBudgetGamma)
    | _tagged("inverse_median_nll", InverseMedianNllGamma),
    _choice("gamma", "ess, schedule, per_sample, bias_variance, kl_budget, inverse_median_nll"),
]
# A list has one beta for each of the job's `rounds`.
BetaSetting: Any = Annotated[
    _tagged("number", Annotated[float, Field(gt=0)])
    | _tagged("list", Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=1000)])
    | _tagged("ess", EssBeta),
    _choice("beta", "ess; or a list, one number for each round"),
]

# What a scheme's signature says: the function gets the number.
Gamma = Annotated[float, ConfiguredAs(GammaSetting)]
Beta = Annotated[float, ConfiguredAs(BetaSetting)]
