"""`Weighting`: how much each sample counts, as the user writes it under `method.weighted`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modeseek_ray.objectives.parameters import Kl, NoFactor, Talr, TokenSection
from modeseek_ray.strict import Strict, one_of
from modeseek_ray.weights.gamma import InverseMedianNllGamma, PerSampleGamma
from modeseek_ray.weights.presets import PRESETS, fill
from modeseek_ray.weights.registry import SECTIONS, positionals, scheme_of

if TYPE_CHECKING:  # the unions are built from the registry at run time
    LikelihoodSection = Any
    RewardSection = Any
    PresetName = str
else:
    LikelihoodSection = one_of(SECTIONS["likelihood"])
    RewardSection = one_of(SECTIONS["reward"])
    PresetName = Literal[tuple(PRESETS)]

# Which figures a column of `Evidence` costs: `needs` speaks in these.
NEED_OF_COLUMN = {
    "log_policy_N": "policy",
    "log_reference_N": "initial",
    "log_behavior_N": "behavior",
    "rewards_N": "rewards",
    "sum_delta_N": "sum_delta",
    "distance_N": "distance",
    "log_round_N": "round",
}
_NEEDS_OF_RATIO = {
    "policy_over_initial": {"policy", "initial"},
    "initial_over_policy": {"policy", "initial"},
    "policy_over_data": {"policy", "behavior"},
    "policy": {"policy"},
    "initial": {"initial"},
    "round_over_data": {"round", "behavior"},
}


class Guards(Strict):
    """What keeps single rows from taking over; each is reported with how often it bound."""

    cap: float | None = Field(10.0, gt=1, le=1e9)
    """Largest weight; the others are scaled so that the mean stays one. None = no cap."""
    mix: float = Field(0.0, ge=0, le=1)
    """epsilon: f becomes (1 - epsilon) f + epsilon, so that no accepted row starves (0.1 suggested)."""
    moving_average: float = Field(0.0, ge=0, lt=1)
    """Share of a row's former L kept at each visit; 0 = none. Needs row ids."""
    pareto_smoothing: bool = False
    """Replace the largest f by the order statistics of a fitted generalised Pareto tail (Vehtari et al.)."""


class Weighting(Strict):
    """Sample weight v = n a f g / sum(a f g): prior x likelihood x reward, with guards.

    With nothing set every row counts the same: plain SFT.

    >>> Weighting(preset="mode_seeking").likelihood.of
    'policy_over_initial'
    """

    preset: PresetName | None = None
    """A method by its name in the literature; it fills what is not set beside it."""
    likelihood: LikelihoodSection = SECTIONS["likelihood"]["uniform"]()
    """f: how much a sample counts by its likelihood."""
    reward: RewardSection = SECTIONS["reward"]["uniform"]()
    """g: how much it counts by its reward."""
    token: TokenSection = NoFactor()
    """c: factors of single tokens, applied by the trainer."""
    kl: Kl | None = None
    """Regulariser towards the start."""
    guards: Guards = Guards()
    """Cap, mix, moving average, Pareto smoothing."""
    rounds: int = Field(1, ge=1, le=1000)
    """With of: round_over_data, into how many equal parts the job is cut: as each begins, the policy is frozen
    as the numerator of its ratio."""
    normalise: bool = True
    """Scale weights to mean one; false uses a f g unchanged, without cap (as several methods' code does)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, Mapping) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return given  # left to the field's own check
        return fill(preset, given)


def resolve(weighting: Weighting) -> dict[str, Any]:
    """Everything spelt out, preset and defaults filled in: what to print, and what gives the same again."""
    return weighting.model_dump(mode="json", include=set(Weighting.model_fields), exclude_none=True)


def needs(weighting: Weighting) -> frozenset[str]:
    """Which evidence the weighting looks at: policy, initial, behavior, rewards, sum_delta, distance, round.

    >>> sorted(needs(Weighting(preset="mode_seeking"))), sorted(needs(Weighting(preset="rwr")))
    (['initial', 'policy'], ['rewards'])
    """
    wanted: set[str] = set()
    for group in ("likelihood", "reward"):
        columns = positionals(scheme_of(group, getattr(weighting, group)))
        wanted |= {NEED_OF_COLUMN[column] for column in columns if column in NEED_OF_COLUMN}
    if uses_likelihood(weighting):
        f = weighting.likelihood
        if "log_ratio_N" in positionals(scheme_of("likelihood", f)):
            first_order = getattr(f, "approximation", "exact") == "first_order"
            wanted |= {"sum_delta"} if first_order else _NEEDS_OF_RATIO[f.of]
            if weighting.rounds == 1 and "round" in wanted:  # which begins at the start
                wanted = wanted - {"round"} | {"initial"}
        gamma = getattr(f, "gamma", None)
        if isinstance(gamma, PerSampleGamma):
            wanted.add("initial" if gamma.per_sample.distance == "initial_nll" else "distance")
        if isinstance(gamma, InverseMedianNllGamma):
            wanted.add("initial")
    if isinstance(weighting.token, Talr) and weighting.token.tau is None:
        wanted.add("policy")
    return frozenset(wanted)


def first_order_ratio(weighting: Weighting) -> Any:
    """Whose token ratios the weighting reads to first order, as its `of` names it; None where it reads none.

    >>> f = {"scheme": "ratio_power", "of": "initial_over_policy", "length_exponent": 0}
    >>> first_order_ratio(Weighting(likelihood={**f, "approximation": "first_order"}))
    'initial_over_policy'
    """
    f = weighting.likelihood
    first_order = getattr(f, "approximation", "exact") == "first_order"
    return f.of if first_order and uses_likelihood(weighting) else None


def uses_likelihood(weighting: Weighting) -> bool:
    """False where f = 1 whatever the evidence: the uniform scheme, or gamma = 0."""
    f = weighting.likelihood
    return f.scheme != "uniform" and getattr(f, "gamma", None) != 0
