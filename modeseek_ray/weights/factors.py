"""f and g of a batch: run the schemes with the numbers their controllers choose (steps 1 to 5 of `weigh`).

A  active rows      S  segments of the reward's scope
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeseek_ray.errors import NumericsError
from modeseek_ray.types import BoolArray, FloatArray
from modeseek_ray.weights.batch import Batch
from modeseek_ray.weights.control import Solved, Tempering, choose_beta, choose_gamma, measure_noise
from modeseek_ray.weights.gamma import PerSampleGamma
from modeseek_ray.weights.guards import pareto_smooth
from modeseek_ray.weights.likelihood import log_positive
from modeseek_ray.weights.preference import preference_metrics
from modeseek_ray.weights.registry import SIGNED, Scheme, keywords, positionals, scheme_of
from modeseek_ray.weights.row_values import RowValues
from modeseek_ray.weights.scope import Scope
from modeseek_ray.weights.solve import log_conditional_ess
from modeseek_ray.weights.sums import dot
from modeseek_ray.weights.weighting import Weighting, uses_likelihood

LARGEST_EXPONENT = 700.0  # exp(709.8) is the largest double


@dataclass(frozen=True)
class Factor:
    """f or g of the active rows, the gamma or beta behind it, and what decided that."""

    values_A: FloatArray
    parameter: float | None = None
    bound_by: str = "none"
    metrics: Mapping[str, float] = field(default_factory=dict)
    remember: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def reward_factor(batch: Batch, weighting: Weighting, progress: float, memory: Mapping[str, Any]) -> Factor:
    """Steps 1 and 2: beta with base a, then g over its scope's a-weighted mean (signed schemes: A itself)."""
    g, scheme = weighting.reward, scheme_of("reward", weighting.reward)
    if g.scheme == "uniform" or len(batch.prior_A) == 0:
        return Factor(np.ones(len(batch.prior_A)))
    scope, remember = _scope(batch, getattr(g, "scope", "batch"), memory)
    base_A = batch.prior_A / (batch.prior_A.sum() or 1.0)

    def log_g(beta: float | None) -> FloatArray:
        return _run(scheme, g, {"scope": scope}, batch, beta=beta)

    def log_ess(beta: float | None) -> float:
        return log_conditional_ess(log_positive(_mean_one(log_g(beta), scope)[0]), base_A)

    ranges_S = _reward_ranges(batch, scope)
    solved = Solved(1.0, "none")
    if "beta" in keywords(scheme):
        spread = float(ranges_S.max(initial=0.0))
        solved = choose_beta(g.beta, log_ess, spread, progress=progress)
    beta = solved.value if "beta" in keywords(scheme) else None
    warnings = list(solved.warnings)
    if len(ranges_S) and not ranges_S.any():
        warnings.append("every reward ties with those it is compared with: rewards say nothing in this batch")
    metrics = {"groups": float(scope.size), "tied_groups": float((ranges_S == 0).sum())}
    log_g_A = log_g(beta)
    if g.scheme == "preference":
        column = batch.columns_A
        log_ratio_A = column["log_policy_N"] - column["log_reference_N"]
        metrics |= preference_metrics(column["rewards_N"], log_ratio_A, scope, g.beta)
    if g.scheme in SIGNED:
        return Factor(log_g_A, beta, solved.bound_by, metrics, remember, tuple(warnings))
    normal_A, skipped_S = _mean_one(log_g_A, scope)
    metrics |= {"skipped_groups": float(skipped_S.sum()), "ess_ratio_reward": float(np.exp(log_ess(beta)))}
    values_A = normal_A if weighting.normalise else _exp(log_g_A, "reward")
    return Factor(values_A, beta, solved.bound_by, metrics, remember, tuple(warnings))


def likelihood_factor(
    batch: Batch, weighting: Weighting, g_A: FloatArray, progress: float, memory: Mapping[str, Any]
) -> Factor:
    """Steps 3 to 5: gamma with base b ~ a g, f to b-mean one, mix."""
    f, scheme = weighting.likelihood, scheme_of("likelihood", weighting.likelihood)
    weight_A = batch.prior_A * g_A
    tempers = "gamma" in keywords(scheme)
    if not uses_likelihood(weighting) or not weight_A.any():
        noise = _noise_without_weight(batch, weighting, progress, memory)
        return Factor(
            np.ones(len(g_A)), 0.0 if tempers else None, "fixed" if tempers else "none", remember=noise
        )
    base_A = weight_A / weight_A.sum()
    ratio_A = np.zeros(len(g_A))
    remember: Mapping[str, Any] = {}
    if "log_ratio_N" in positionals(scheme):
        ratio_A, remember = _log_ratio(batch, weighting, memory)
    tempered_A = ratio_A
    if tempers and isinstance(f.gamma, PerSampleGamma):
        tempered_A = _per_sample(batch, f.gamma, ratio_A, base_A)

    def log_f(gamma: float | None) -> FloatArray:
        log_f_A = _run(scheme, f, {"log_ratio_N": tempered_A}, batch, gamma=gamma)
        clip = getattr(f, "clip", None)
        return log_f_A if clip is None else np.clip(log_f_A, *log_positive(np.asarray(clip, float)))

    tempering = Tempering(ratio_A, base_A, log_f, getattr(f, "of", None))
    solved, gamma = Solved(1.0, "none"), None
    if tempers:
        solved = choose_gamma(
            f.gamma, tempering, progress=progress, memory=memory, median_nll=lambda: _median_nll(batch)
        )
        gamma = solved.value
    log_f_A = log_f(gamma)
    metrics = _ratio_metrics(tempering, log_f_A, {**memory, **solved.remember})
    if weighting.guards.pareto_smoothing:
        log_f_A, khat = pareto_smooth(np.where(base_A > 0, log_f_A, -np.inf))
        metrics |= {} if khat is None else {"khat_likelihood": khat}
    values_A = _b_mean_one(log_f_A, weight_A) if weighting.normalise else _exp(log_f_A, "likelihood")
    mix = weighting.guards.mix
    if mix > 0:
        values_A = (1 - mix) * values_A + mix
    return Factor(values_A, gamma, solved.bound_by, metrics, {**remember, **solved.remember}, solved.warnings)


def _noise_without_weight(
    batch: Batch, weighting: Weighting, progress: float, memory: Mapping[str, Any]
) -> dict[str, float]:
    """The noise of L where g is zero for every row: under the priors alone, which is all that is left."""
    f = weighting.likelihood
    reads_ratio = "log_ratio_N" in positionals(scheme_of("likelihood", f))
    if not uses_likelihood(weighting) or not reads_ratio or not batch.prior_A.any():
        return {}
    base_A = batch.prior_A / batch.prior_A.sum()
    tempering = Tempering(batch.log_ratio(f), base_A, np.zeros_like, getattr(f, "of", None))
    return measure_noise(tempering, progress=progress, memory=memory)


def _run(
    scheme: Scheme, section: Any, derived: Mapping[str, Any], batch: Batch, **solved: float | None
) -> FloatArray:
    """Call a scheme: what it looks at by position, configuration by keyword, solved numbers in place."""
    seen = [derived[name] if name in derived else batch.column(name) for name in positionals(scheme)]
    given = {name: solved.get(name, getattr(section, name)) for name in keywords(scheme)}
    log_A = np.broadcast_to(np.asarray(scheme(*seen, **given), np.float64), batch.prior_A.shape)
    if np.isnan(log_A).any() or (log_A == np.inf).any():
        raise NumericsError(
            f"scheme {section.scheme} gave {log_A[np.isnan(log_A) | (log_A == np.inf)][0]} for a row.",
            mend="Schemes return log f or log g: finite, or -inf for zero.",
        )
    return log_A


def _scope(batch: Batch, wanted: str, memory: Mapping[str, Any]) -> tuple[Scope, dict[str, Any]]:
    """The scope of rewards. `auto` becomes `group` with the first prompt that has several, and stays so."""
    groups = Scope.of(batch.group_A, batch.prior_A)
    if wanted == "group":
        return groups, {}
    if wanted == "auto" and (memory.get("scope") == "group" or (groups.count_S > 1).any()):
        return groups, {"scope": "group"}
    return Scope.batch(batch.prior_A), {}


def _reward_ranges(batch: Batch, scope: Scope) -> FloatArray:
    """How far rewards that are compared with each other lie apart; segments without prior mass left out."""
    rewards_A = batch.columns_A.get("rewards_N")
    if rewards_A is None:
        return np.zeros(0)
    range_S = scope.max(rewards_A) - scope.min(rewards_A)
    return range_S[np.isfinite(range_S)]


def _mean_one(log_g_A: FloatArray, scope: Scope) -> tuple[FloatArray, BoolArray]:
    """g over its scope's prior-weighted mean, and which scopes have no weight at all (they are skipped)."""
    most_S = scope.max(log_g_A)
    skipped_S = most_S == -np.inf
    shift_S = np.where(skipped_S, 0.0, most_S)
    # Rows of zero prior may lie above the largest counted one; they weigh nothing, so hold them there.
    g_A = np.exp(np.minimum(log_g_A - scope.spread(shift_S), 0.0))
    g_A = np.where(scope.spread(skipped_S), 0.0, g_A)
    mean_S = scope.mean(g_A)
    return g_A / scope.spread(np.where(mean_S > 0, mean_S, 1.0)), skipped_S


def _b_mean_one(log_f_A: FloatArray, weight_A: FloatArray) -> FloatArray:
    """exp(log f) over its mean under the unnormalised base; exact ones where all are equal."""
    most = log_f_A[weight_A > 0].max(initial=-np.inf)
    if most == -np.inf:
        return np.zeros(len(log_f_A))
    f_A = np.exp(np.minimum(log_f_A - most, 0.0))
    return f_A * (weight_A.sum() / dot(weight_A, f_A))


def _log_ratio(
    batch: Batch, weighting: Weighting, memory: Mapping[str, Any]
) -> tuple[FloatArray, dict[str, Any]]:
    """L, averaged over a row's visits where asked for, and what to remember of it."""
    ratio_A = batch.log_ratio(weighting.likelihood)
    keep = weighting.guards.moving_average
    if keep == 0 or batch.row_A is None:
        return ratio_A, {}
    former = RowValues.of(memory.get("log_ratio"))
    before_A = former.at(batch.row_A)
    ratio_A = np.where(np.isnan(before_A), ratio_A, keep * before_A + (1 - keep) * ratio_A)
    return ratio_A, {"log_ratio": former.put(batch.row_A, ratio_A)}


def _per_sample(batch: Batch, setting: PerSampleGamma, ratio_A: FloatArray, base_A: FloatArray) -> FloatArray:
    """(L - mean L) / (1 + d/tau): one gamma for all rows then acts as gamma_i = gamma / (1 + d_i/tau)."""
    how = setting.per_sample
    nll_A = batch.initial_nll_A
    distance_A = batch.columns_A["distance_N"] if how.distance == "kl" or nll_A is None else nll_A
    scale = how.scale or float(np.median(distance_A))
    mean = dot(base_A, ratio_A)
    if scale <= 0:
        return ratio_A - mean
    return (ratio_A - mean) / (1 + distance_A / scale)


def _median_nll(batch: Batch) -> float:
    nll_A = batch.initial_nll_A
    return 0.0 if nll_A is None else float(np.median(nll_A))


def _exp(log_A: FloatArray, section: str) -> FloatArray:
    """exp, for weights that are used unchanged. Raises `NumericsError` beyond a double's range."""
    most = log_A.max(initial=-np.inf)
    if most > LARGEST_EXPONENT:
        raise NumericsError(
            f"a {section} factor of e^{most:.0f} cannot be used unchanged.",
            mend="Set normalise: true, or clip it.",
            param=f"method.weighted.{section}",
        )
    return np.exp(log_A)


def _ratio_metrics(tempering: Tempering, log_f_A: FloatArray, memory: Mapping[str, Any]) -> dict[str, float]:
    """Where L lies, against what rounding alone gave, and the ratio the ESS floor is held against."""
    ratio_A = tempering.log_ratio_A
    shares = {"L_q05": 0.05, "L_q25": 0.25, "L_q50": 0.5, "L_q75": 0.75, "L_q95": 0.95}
    quantiles = np.quantile(ratio_A, list(shares.values()))
    metrics = dict(zip(shares, quantiles.tolist(), strict=True))
    metrics |= {"L_mean": float(ratio_A.mean()), "L_std": tempering.std}
    metrics["ess_ratio_likelihood"] = float(np.exp(log_conditional_ess(log_f_A, tempering.base_A)))
    noise = memory.get("noise_std")
    if noise is not None:
        metrics["noise_std"] = float(noise)
    if noise:
        metrics["L_over_noise"] = tempering.std / noise
    return metrics
