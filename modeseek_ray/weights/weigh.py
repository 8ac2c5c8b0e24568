"""The order of operations: from the evidence of one global batch to one number per sample.

    v_i = n a_i f_i g_i / sum_j a_j f_j g_j        a prior, f likelihood, g reward; mean one

The steps are METHODS.md section 1, numbered alike, so that the controllers do not fight: beta is
solved before gamma, gamma under the base that priors and rewards leave, guards come last.

    N  all rows of the batch      A  active rows: new and, where rewards are used, rewarded
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeseek_ray.errors import NumericsError
from modeseek_ray.objectives.parameters import Kl
from modeseek_ray.types import Evidence, FloatArray, StepReport, Weights
from modeseek_ray.weights.batch import Batch
from modeseek_ray.weights.checks import refuse_impossible
from modeseek_ray.weights.control import UNTRAINED, adapt_kl_coefficient, kl_coefficient
from modeseek_ray.weights.factors import Factor, likelihood_factor, reward_factor
from modeseek_ray.weights.guards import cap_keeping_sum
from modeseek_ray.weights.metrics import measure
from modeseek_ray.weights.registry import SIGNED
from modeseek_ray.weights.token import token_parameters
from modeseek_ray.weights.weighting import Weighting

MEASURABLE = ("kl_nats", "median_initial_nll", "noise_std")


def weigh(
    evidence: Evidence, weighting: Weighting, *, progress: float = 1.0, state: Mapping[str, Any] | None = None
) -> Weights:
    """One weight per sample of the global batch.

    `progress` is finished steps over all steps (for warm-ups and schedules); `state` is the `state` of
    the last `Weights`, after `observe`. Pure: nothing handed in is changed.

    Raises `ConfigError` for a weighting that cannot work or evidence that is missing, `NumericsError`
    for a row that cannot be weighted.

    >>> two = Evidence(np.array([0., 1.]), np.zeros(2), np.ones(2))
    >>> setting = {"scheme": "ratio_power", "gamma": {"ess": {"floor": 0.8, "max": 2.0, "warmup": 0.0}}}
    >>> round(weigh(two, Weighting.model_validate({"likelihood": setting})).gamma, 6)  # ln 3
    1.098612
    """
    refuse_impossible(weighting)
    memory = dict(state or {})
    batch = Batch.of(evidence, weighting)
    reward = reward_factor(batch, weighting, progress, memory)  # 1, 2
    if weighting.reward.scheme in SIGNED:
        likelihood, final = Factor(np.ones(len(batch.prior_A))), Final(batch.prior_A * reward.values_A)
    else:
        likelihood = likelihood_factor(batch, weighting, reward.values_A, progress, memory)  # 3, 4, 5
        final = _combine(batch, weighting, likelihood.values_A, reward.values_A)  # 6, 7
    values_N = _with_neutral_rows(batch, weighting, final.values_A)
    new_A = values_N[batch.active_N]

    memory |= {**reward.remember, **likelihood.remember}
    metrics = measure(batch, new_A, memory)
    of_tokens = token_parameters(evidence, weighting)
    return Weights(
        values_N=values_N,
        gamma=likelihood.parameter,
        beta=reward.parameter,
        ess_ratio=metrics["ess_ratio"],
        bound_by=likelihood.bound_by,
        state={key: value for key, value in memory.items() if value is not None},
        metrics={
            **reward.metrics,
            **likelihood.metrics,
            **final.metrics,
            **metrics,
            **{f"token_{name}": value for name, value in of_tokens.items()},
        },
        warnings=(*reward.warnings, *likelihood.warnings, *final.warnings),
        loss=reward.metrics.get("preference_loss"),
        token_parameters=of_tokens,
    )


def observe(
    state: Mapping[str, Any],
    report: StepReport | None = None,
    *,
    kl: Kl | None = None,
    **measured: float | None,
) -> dict[str, Any]:
    """Controller state with what a step measured: the report's KL, or figures by name.

    With a `kl` that has a budget, the coefficient of the next step (`kl_coefficient`) moves with it.

    `kl_nats` is the forward KL to the start per trained token, `median_initial_nll` the data set's
    median of the mean NLL per token under the start, `noise_std` the deviation of L by rounding.

    What is observed of an empty state and comes of no step is what a job knows before its first: until
    a report, the state then says that policy and start are still one model.

    >>> observe(observe({}), StepReport(0, 1.0, 1.0, 0.5, 1.0, 1e-3, 6, kl_nats=0.25))
    {'kl_nats': 0.25}
    """
    if report is not None:
        measured = {"kl_nats": report.kl_nats, **measured}
    unknown = set(measured) - set(MEASURABLE)
    if unknown:
        raise TypeError(f"cannot observe {sorted(unknown)}; known are {', '.join(MEASURABLE)}")
    for name, value in measured.items():
        if value is not None and not math.isfinite(value):
            raise NumericsError(f"measured {name} is {value}.", mend="The controller needs finite figures.")
    known = {name: float(value) for name, value in measured.items() if value is not None}
    if kl is not None and kl.budget is not None and "kl_nats" in known:
        known["kl_coefficient"] = adapt_kl_coefficient(kl, kl_coefficient(kl, state), known["kl_nats"])
    stepped = report is not None or "kl_nats" in known
    before = {UNTRAINED: True} if not state and not stepped else state
    return {**{name: value for name, value in before.items() if name != UNTRAINED or not stepped}, **known}


@dataclass(frozen=True)
class Final:
    """The active rows' weights after guards."""

    values_A: FloatArray
    metrics: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _combine(batch: Batch, weighting: Weighting, f_A: FloatArray, g_A: FloatArray) -> Final:
    """Steps 6 and 7 on active rows: a f g to a-mean one among themselves, then the cap."""
    share_A = batch.prior_A * f_A * g_A
    if not weighting.normalise:
        return Final(share_A)
    total, mass = share_A.sum(), batch.prior_A.sum()
    warnings: tuple[str, ...] = ()
    if total > 0:
        share_A = share_A * (mass / total)
    elif batch.active_N.any():
        warnings = ("no new row of this batch has any weight: the step learns nothing from them",)
    scale = batch.size / batch.prior_N.sum()  # the batch's own mean one
    cap = weighting.guards.cap
    if cap is None:
        return Final(share_A, warnings=warnings)
    capped_A, used = cap_keeping_sum(share_A * scale, cap)
    bound_A = capped_A >= used
    bound = float(bound_A.mean()) if used > cap or (share_A * scale).max(initial=0.0) > cap else 0.0
    metrics = {"cap": used, "cap_bound_share": bound}
    if used == cap:
        return Final(capped_A / scale if bound else share_A, metrics, warnings)
    message = (
        f"the cap {cap:g} was raised to {used:.4g}: only {int(bound_A.sum())} rows have any weight, "
        "too few to carry the batch's mean of one under it"
    )
    return Final(capped_A / scale, metrics, (message,))


def _with_neutral_rows(batch: Batch, weighting: Weighting, share_A: FloatArray) -> FloatArray:
    """All rows: replay and unrewarded rows have f = g = 1, and the batch has mean one."""
    values_N = batch.prior_N.copy()
    values_N[batch.active_N] = share_A
    if not weighting.normalise or weighting.reward.scheme in SIGNED:
        return values_N
    return batch.size * values_N / batch.prior_N.sum()
