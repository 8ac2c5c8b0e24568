"""Token factors and KL as the user names them: parameters, defaults, ranges. No torch here.

`factors.py` has one function per name, whose keyword parameters are the fields of the class here.
p is the detached probability pi_theta(y_t) of the trained token. Factors multiply the sample weight
and are averaged with the same denominator, so that a factor of 1 is ordinary training.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modeseek_ray.strict import Strict, one_of


class NoFactor(Strict):
    """c = 1"""

    scheme: Literal["none"] = "none"


class Dft(Strict):
    """c = p^gamma (dynamic fine-tuning, 2508.05629; gamma = 1 there)"""

    scheme: Literal["dft"] = "dft"
    gamma: float = Field(1.0, ge=0, le=10)


class Psft(Strict):
    """c = rho 1[rho <= 1 + clip], rho against the policy at the start of the inner loop (2508.17784)"""

    scheme: Literal["psft"] = "psft"
    clip: float = Field(0.28, gt=0, le=10)


class Eaft(Strict):
    """c = (H / ln 20)^alpha, H the entropy of the softmax renormalised over the top 20 (2601.02151)"""

    scheme: Literal["eaft"] = "eaft"
    alpha: float = Field(1.0, ge=0, le=10)


class InfoSft(Strict):
    """c = p relu(1 - logit p / logit threshold) (2605.14967)"""

    scheme: Literal["infosft"] = "infosft"
    threshold: float = Field(0.93, gt=0.5, lt=1)


class RatioToken(Strict):
    """c = clip(rho^gamma, low, high), rho = pi_theta / pi_0 of the token"""

    scheme: Literal["ratio_token"] = "ratio_token"
    gamma: float = Field(1.0, ge=-2, le=2)
    low: float = Field(0.2, ge=0, le=1)
    high: float = Field(5.0, ge=1, le=1e6)


class Talr(Strict):
    """c = max(p^(1/tau), floor) (token-adaptive loss reweighting, 2509.20758)"""

    scheme: Literal["talr"] = "talr"
    tau: float | None = Field(None, gt=0, le=1e6)
    """Nats; None = the batch's median, over samples, of the mean NLL per token under the policy."""
    floor: float = Field(0.01, ge=0, le=1)
    """Smallest factor, so that no token is dropped altogether."""


TOKEN_FACTORS: dict[str, type[Strict]] = {
    "none": NoFactor,
    "dft": Dft,
    "psft": Psft,
    "eaft": Eaft,
    "infosft": InfoSft,
    "ratio_token": RatioToken,
    "talr": Talr,
}

TokenSection = one_of(TOKEN_FACTORS)


class Clip(Strict):
    """Staleness: what becomes of rho_t = pi_theta / pi_old when a batch is trained on in several steps,
    or was written by an older policy (METHODS.md section 4)."""

    scheme: Literal["ppo", "clamp"] = "ppo"
    low: float = Field(0.2, ge=0, lt=1)
    """epsilon_low: the lower bound is 1 - low."""
    high: float = Field(0.27, gt=0, le=1000)
    """epsilon_high: the upper bound is 1 + high."""
    level: Literal["token", "sequence"] = "token"
    """A ratio per token, or one per sample: the geometric mean over its tokens."""


class Tis(Strict):
    """Truncated importance sampling: min(pi_old(trainer) / pi_sampler(engine), cap)"""

    scheme: Literal["tis"] = "tis"
    cap: float = Field(2.0, gt=0, le=1000)
    level: Literal["token", "sequence"] = "token"


class Mis(Strict):
    """Masked importance sampling: the same ratio, zero outside [low, high]"""

    scheme: Literal["mis"] = "mis"
    low: float = Field(0.5, ge=0, le=1)
    high: float = Field(5.0, ge=1, le=1000)
    level: Literal["token", "sequence"] = "token"


MismatchSection = one_of({"tis": Tis, "mis": Mis})


class CoefficientBudget(Strict):
    """Steers the coefficient: after a step that measured KL, it is multiplied by
    1 + rate x clip(KL/nats - 1, -1, 1), and kept within [min, max]."""

    nats: float = Field(gt=0, le=1000)
    """The budget: KL in the named direction, per trained token of the batch."""
    rate: float = Field(0.1, gt=0, lt=1)
    """Largest relative change per step."""
    min: float = Field(1e-4, gt=0, le=1000)
    max: float = Field(100.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _bounds(self) -> CoefficientBudget:
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Kl(Strict):
    """Regulariser: KL per response position over the whole vocabulary, averaged over trained tokens."""

    direction: Literal["forward", "reverse"]
    """forward = KL(pi_0 || pi), which keeps what the start could do; reverse = KL(pi || pi_0)."""
    coefficient: float = Field(0.05, ge=0, le=1000)
    """Loss units per nat; with a budget, where it starts."""
    budget: CoefficientBudget | None = None
    """Adapt the coefficient so that the measured KL stays near a number of nats."""

    @model_validator(mode="after")
    def _start(self) -> Kl:
        if self.budget is not None and not self.budget.min <= self.coefficient <= self.budget.max:
            raise ValueError(
                f"with a budget the coefficient starts at {self.coefficient:g}, which is outside"
                f" [{self.budget.min:g}, {self.budget.max:g}]; change it, or the budget's min and max"
            )
        return self


def factor_parameters(section: Strict) -> dict[str, float]:
    """What `Objective.token_parameters` holds: the section without its name, and without what is measured
    for each batch instead (`weights.token.token_parameters`).

    >>> factor_parameters(Eaft(alpha=2.0))
    {'alpha': 2.0}
    """
    return section.model_dump(exclude={"scheme"}, exclude_none=True)
