"""From what the user wrote under `gamma:` and `beta:` to the numbers of this step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from modeseek_ray.objectives.parameters import Kl
from modeseek_ray.types import FloatArray
from modeseek_ray.weights import gamma as ways
from modeseek_ray.weights.likelihood import RATIOS_TO_START
from modeseek_ray.weights.solve import largest_feasible, largest_feasible_unbounded, log_conditional_ess
from modeseek_ray.weights.sums import dot

NOISE_FACTOR = 3.0  # L counts as signal beyond this many deviations of what rounding alone gave
UNTRAINED = "untrained"  # in the controller's state until the first step's report
NEARER_WITH_GAMMA = {"initial": 1.0, "initial_over_policy": 1.0, "policy_over_initial": -1.0}


@dataclass(frozen=True)
class Solved:
    """The number, what decided it, and what to remember for the next step."""

    value: float
    bound_by: str
    remember: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tempering:
    """What choosing gamma looks at: log ratios, the base b (sums to one), log f as a function of gamma."""

    log_ratio_A: FloatArray
    base_A: FloatArray
    log_f: Callable[[float], FloatArray]
    of: str | None

    @cached_property
    def std(self) -> float:
        """Deviation of L under b; exactly 0 where all L are the same number."""
        live_A = self.log_ratio_A[self.base_A > 0]
        if len(live_A) == 0 or live_A.min() == live_A.max():
            return 0.0
        mean = dot(self.base_A, self.log_ratio_A)
        return float(np.sqrt(dot(self.base_A, np.square(self.log_ratio_A - mean))))

    def log_ess(self, gamma: float) -> float:
        return 0.0 if gamma == 0 else log_conditional_ess(self.log_f(gamma), self.base_A)


def choose_gamma(
    setting: Any,
    tempering: Tempering,
    *,
    progress: float,
    memory: Mapping[str, Any],
    median_nll: Callable[[], float],
) -> Solved:
    """This step's gamma. The noise floor (`measure_noise`) goes before every way to choose it.

    `progress` is finished steps over all steps.
    """
    remember = measure_noise(tempering, progress=progress, memory=memory)
    noise = remember.get("noise_std", memory.get("noise_std"))
    below_noise = (
        tempering.of in RATIOS_TO_START and noise is not None and tempering.std <= NOISE_FACTOR * noise
    )
    if below_noise and setting != 0:
        return Solved(0.0, "noise", remember)
    solved = _choose(setting, tempering, progress, memory, median_nll)
    return Solved(solved.value, solved.bound_by, {**remember, **solved.remember}, solved.warnings)


def measure_noise(tempering: Tempering, *, progress: float, memory: Mapping[str, Any]) -> dict[str, float]:
    """`noise_std`, to remember: what L varies by before the first optimizer step, once; or nothing.

    Until then policy and start are the same model, so that L is rounding. Rounds that are skipped move
    `progress` and no weight, which is why `memory` says so itself (`UNTRAINED`); without it, no progress does.
    """
    untrained = bool(memory.get(UNTRAINED)) or progress == 0
    if tempering.of not in RATIOS_TO_START or not untrained or memory.get("noise_std") is not None:
        return {}
    return {"noise_std": tempering.std}


def _choose(
    setting: Any,
    tempering: Tempering,
    progress: float,
    memory: Mapping[str, Any],
    median_nll: Callable[[], float],
) -> Solved:
    match setting:
        case ways.EssGamma():
            return _by_ess(setting.ess, tempering, progress)
        case ways.PerSampleGamma():
            return _by_ess(setting.per_sample, tempering, progress)
        case ways.ScheduleGamma():
            return Solved(scheduled(setting.schedule, progress), "schedule")
        case ways.BiasVarianceGamma():
            return Solved(optimal_gamma(setting.bias_variance), "bias_variance")
        case ways.KlBudgetGamma():
            return _by_kl(setting.kl_budget, NEARER_WITH_GAMMA[str(tempering.of)], memory)
        case ways.InverseMedianNllGamma():
            median = (
                setting.inverse_median_nll.median_nats or memory.get("median_initial_nll") or median_nll()
            )
            return Solved(1.0 / median, "fixed") if median > 0 else Solved(0.0, "fixed")
    return Solved(float(setting), "fixed")


def _by_ess(ess: ways.Ess, tempering: Tempering, progress: float) -> Solved:
    if tempering.std == 0:
        return Solved(0.0, "noise")  # every gamma meets every floor: the data say nothing
    share = 1.0 if ess.warmup == 0 else min(1.0, progress / ess.warmup)
    cap = ess.max * share
    if cap == 0:
        return Solved(0.0, "warmup")
    value, bound = largest_feasible(tempering.log_ess, ess.floor, cap)
    if bound:
        return Solved(value, "ess")
    warnings: tuple[str, ...] = ()
    top_A = tempering.log_ratio_A == tempering.log_ratio_A[tempering.base_A > 0].max()
    tied = float(tempering.base_A[top_A].sum())
    if ess.floor <= tied:
        warnings = (
            f"the ESS floor {ess.floor:g} cannot bind: rows with {tied:.3g} of the base weight tie at the "
            "largest ratio; raise likelihood.gamma.ess.floor or the batch size",
        )
    return Solved(value, "cap" if share == 1 else "warmup", warnings=warnings)


def _by_kl(budget: ways.KlBudget, nearer: float, memory: Mapping[str, Any]) -> Solved:
    """Integral control on the KL measured since the last weighing; unmoved where none was."""
    value = float(memory.get("kl_gamma", budget.start))
    measured = memory.get("kl_nats")
    if measured is not None:
        value += nearer * budget.rate * (measured / budget.nats - 1)
    value = min(max(value, 0.0), budget.max)
    return Solved(value, "cap" if value == budget.max else "kl_budget", {"kl_gamma": value, "kl_nats": None})


def kl_coefficient(kl: Kl | None, memory: Mapping[str, Any]) -> float:
    """This step's coefficient of the KL term: the user's number, or where the budget has steered it."""
    if kl is None:
        return 0.0
    return kl.coefficient if kl.budget is None else float(memory.get("kl_coefficient", kl.coefficient))


def adapt_kl_coefficient(kl: Kl, coefficient: float, measured_nats: float) -> float:
    """The next coefficient, multiplied towards the budget (the adaptive KL controller of 1909.08593).

    >>> kl = Kl(direction="forward", coefficient=0.5, budget={"nats": 0.1, "rate": 0.2})
    >>> [round(adapt_kl_coefficient(kl, 0.5, measured_nats=nats), 6) for nats in (0.1, 0.15, 9.0)]
    [0.5, 0.55, 0.6]
    """
    budget = kl.budget
    if budget is None:
        return coefficient
    error = min(max(measured_nats / budget.nats - 1, -1.0), 1.0)
    return min(max(coefficient * (1 + budget.rate * error), budget.min), budget.max)


def optimal_gamma(trade: ways.BiasVariance) -> float:
    """The minimiser of delta (1 - gamma)^2 + sigma^2 gamma.

    >>> optimal_gamma(ways.BiasVariance(bias_squared=1.0, variance_slope=0.5))
    0.75
    """
    return max(0.0, 1 - trade.variance_slope / (2 * trade.bias_squared))


def scheduled(schedule: ways.Schedule, progress: float) -> float:
    """Gamma at `progress` in [0, 1].

    >>> scheduled(ways.Schedule(kind="linear", start=0.0, end=1.0), 0.5)
    0.5
    """
    p = min(max(progress, 0.0), 1.0)
    if schedule.kind == "cosine":
        return float(schedule.start + (schedule.end - schedule.start) * (1 - np.cos(np.pi * p)) / 2)
    knots = [(0.0, schedule.start), *(schedule.points or []), (1.0, schedule.end)]
    return float(np.interp(p, [at for at, _ in knots], [gamma for _, gamma in knots]))


def beta_of_round(betas: Sequence[float], progress: float) -> float:
    """The round's own number where a job's steps are cut into as many equal rounds.

    >>> [beta_of_round([4.0, 2.0], progress) for progress in (0.0, 0.49, 0.5, 1.0)]
    [4.0, 4.0, 2.0, 2.0]
    """
    # progress is a quotient of whole steps: 1e-9 is beyond its rounding and below any step.
    return float(betas[min(len(betas) - 1, int(progress * len(betas) + 1e-9))])


def choose_beta(
    setting: Any, log_ess_of_beta: Callable[[float], float], spread: float, *, progress: float
) -> Solved:
    """This step's beta: the round's, or the sharpest whose ESS stays above the floor, solved in 1/beta.

    `spread` is the largest distance between rewards that are compared with each other; 0 means that
    every comparison ties and that any beta gives the same weights.
    """
    if isinstance(setting, list):
        return Solved(beta_of_round(setting, progress), "fixed")
    if not isinstance(setting, ways.EssBeta):
        return Solved(float(setting), "fixed")
    if spread == 0:
        return Solved(1.0, "none")

    def log_ess(inverse: float) -> float:
        return 0.0 if inverse == 0 else log_ess_of_beta(1.0 / inverse)

    inverse, bound = largest_feasible_unbounded(log_ess, setting.ess.floor, 1.0 / max(spread, 1e-290))
    if bound:
        return Solved(1.0 / inverse, "ess")
    limit = float(np.exp(log_ess(inverse)))
    message = (
        f"the reward ESS floor {setting.ess.floor:g} cannot bind: as beta falls the ratio stays at "
        f"{limit:.3g} (too many ties at the top, or too few samples); raise reward.beta.ess.floor"
    )
    return Solved(1.0 / inverse, "none", warnings=(message,))
