"""g: weighting by reward. Each scheme returns log g; a `scope` argument gives statistics of a prompt's rows.

Means and deviations are prior-weighted; ranks count rows. Where every reward of a scope ties, the
scheme says nothing about its rows and must return one value for all of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.optimize import elementwise
from scipy.special import gammaln

from modeseek_ray.errors import NumericsError
from modeseek_ray.strict import Strict
from modeseek_ray.types import FloatArray, IntArray
from modeseek_ray.weights.gamma import Beta
from modeseek_ray.weights.likelihood import log_positive
from modeseek_ray.weights.scope import Scope

EPSILON = 1e-8  # added to standard deviations (AWR, GRPO)


class Rewarded(Strict):
    """What every scheme on rewards has in common."""

    scope: Literal["auto", "group", "batch"] = "auto"
    """Compare rewards within a prompt's samples or over the batch; auto = group once a prompt has several."""


def uniform() -> FloatArray:
    """g = 1

    What: rewards, if there are any, are not looked at.
    Use: demonstrations without rewards.
    Not: never wrong.
    """
    return np.zeros(())


def linear(rewards_N: FloatArray) -> FloatArray:
    """g = r

    What: reward-weighted SFT; for 0/1 rewards the same as keeping the right ones.
    Use: rewards that are probabilities or counts.
    Not: negative rewards (refused); not invariant to a shift of the rewards.
    """
    if (rewards_N < 0).any():
        raise NumericsError(
            f"reward {rewards_N.min():g} is negative.",
            mend="scheme: linear needs rewards >= 0; choose exponential, or shift the rewards.",
            param="method.weighted.reward.scheme",
        )
    return log_positive(rewards_N)


def exponential(rewards_N: FloatArray, *, beta: Beta = 1.0) -> FloatArray:
    """g = exp(r / beta)

    What: the optimum of E[r] - beta KL(pi || mu) (Peters & Schaal 2007); softmax within the scope.
    Use: the default for graded samples; beta in reward units, or by ESS.
    Not: rewards with rare extreme values (clip them, or use alpha).
    """
    return rewards_N / beta


def clipped_exponential(rewards_N: FloatArray, *, beta: Beta = 1.0, r_max: float = 1.0) -> FloatArray:
    """g = exp(min(r, r_max) / beta)

    What: exponential, indifferent above r_max.
    Use: when rewards above a value are noise or hacking.
    Not: r_max below most rewards: everything ties. Not invariant to a shift of the rewards.
    """
    return np.minimum(rewards_N, r_max) / beta


def alpha(
    rewards_N: FloatArray,
    scope: Scope,
    *,
    alpha: Annotated[float, Field(ge=0, le=100)] = 1.0,
    beta: Beta = 1.0,
) -> FloatArray:
    """g = [1 + (alpha/beta)(r - lambda)]_+^(1/alpha)

    What: the exact optimum under an alpha-divergence; lambda makes the prior-weighted mean one within
    the scope. alpha -> 0 is exponential, alpha = 1 is linear in r with a floor at zero.
    Use: lighter tails than exponential; bad samples get exactly zero.
    Not: together with policy_over_data at gamma = 1 - alpha, whose fixed point it already is.
    """
    if alpha == 0:
        return rewards_N / beta
    slope = alpha / beta

    def log_g(lambda_N: FloatArray) -> FloatArray:
        x_N = np.maximum(slope * (rewards_N - lambda_N), -1.0)
        return np.log1p(x_N, out=np.full(x_N.shape, -np.inf), where=x_N > -1.0) / alpha

    low_S, high_S = scope.min(rewards_N), scope.max(rewards_N)
    live_S = np.flatnonzero(high_S > low_S)
    lambda_S = np.where(np.isfinite(high_S), high_S, 0.0)
    if len(live_S):

        def excess(guess: FloatArray, segment: FloatArray) -> FloatArray:
            # The solver hands over only unsettled segments; scatter them, and look at those alone.
            index = segment.astype(np.int64)
            trial_S = lambda_S.copy()
            trial_S[index] = guess
            return _log_mean(scope, log_g(scope.spread(trial_S)))[index]

        bracket = (low_S[live_S], high_S[live_S])
        lambda_S[live_S] = elementwise.find_root(
            excess, bracket, args=(live_S.astype(float),), tolerances={"xrtol": 1e-15, "xatol": 1e-300}
        ).x
    return log_g(scope.spread(lambda_S))


def power(rewards_N: FloatArray, scope: Scope, *, beta: Annotated[float, Field(gt=0)] = 1.0) -> FloatArray:
    """g = (r - r_min)^(1/beta)

    What: the shorthand of alpha; the worst sample of the scope gets zero.
    Use: a quick, scale-free preference for better samples.
    Not: noisy minima: one bad outlier makes all others alike.
    """
    above_N = rewards_N - scope.spread(np.where(np.isfinite(low_S := scope.min(rewards_N)), low_S, 0.0))
    tied_N = scope.spread(scope.max(above_N) <= 0)
    return np.where(tied_N, 0.0, log_positive(above_N) / beta)


def threshold(rewards_N: FloatArray, *, threshold: float = 1.0) -> FloatArray:
    """g = 1[r >= threshold]

    What: rejection-sampling fine-tuning (RFT, RAFT).
    Use: verifiable rewards.
    Not: a threshold that few rows pass: watch `skipped_groups`. Not invariant to a shift.
    """
    return np.where(rewards_N >= threshold, 0.0, -np.inf)


def top_k(
    rewards_N: FloatArray,
    scope: Scope,
    *,
    share: Annotated[float, Field(gt=0, le=1)] = 0.25,
    ties: Literal["keep_all", "first", "none"] = "keep_all",
) -> FloatArray:
    """g = 1 on the best ceil(share n), else 0

    What: top-K SFT. Ties at the boundary: keep_all keeps them all, first those that come first,
    none drops them all.
    Use: many samples a prompt, rewards trusted by rank only.
    Not: rewards that mostly tie.
    """
    keep_N = scope.spread(np.ceil(share * scope.count_S - 1e-9).astype(np.int64))
    at_most_N, below_N = scope.counts_at_most(rewards_N)
    count_N = scope.spread(scope.count_S)
    above_N = count_N - at_most_N  # rows that are strictly better
    tied_N = at_most_N - below_N
    if ties == "keep_all":
        kept_N = above_N < keep_N
    elif ties == "none":
        kept_N = above_N + tied_N <= keep_N
    else:
        order_N = np.lexsort((np.arange(len(rewards_N)), -rewards_N, scope.segment_N))
        start_S = np.concatenate([[0], np.cumsum(scope.count_S)[:-1]])
        rank_N = np.empty(len(rewards_N), np.int64)
        rank_N[order_N] = np.arange(len(rewards_N)) - start_S[scope.segment_N[order_N]]
        kept_N = rank_N < keep_N
    return np.where(kept_N, 0.0, -np.inf)


def advantage(
    rewards_N: FloatArray, scope: Scope, *, clip: Annotated[float, Field(gt=0)] = 20.0
) -> FloatArray:
    """g = min(exp((r - mean) / (std + 1e-8)), clip)

    What: exponential with beta = the scope's population deviation; AWR's clip at 20 (Peng et al. 2019).
    Use: rewards of unknown scale.
    Not: few samples a prompt, whose deviation is noise; all-or-nothing rewards with rare successes.
    """
    centred_N = rewards_N - scope.spread(scope.mean(rewards_N))
    return np.minimum(centred_N / (scope.spread(scope.std(rewards_N)) + EPSILON), np.log(clip))


def best_of_n(
    rewards_N: FloatArray, scope: Scope, *, n: Annotated[int, Field(ge=1, le=100_000)] = 2
) -> FloatArray:
    """g = [C(b,N) - C(a,N)] / [(b - a) C(n,N)]

    What: the chance that best-of-N drawn from the scope's n samples picks this one; b = #{r <= r_i},
    a = #{r < r_i}. The exact distribution is mu(y) [F^N - F-^N]/[F - F-], KL <= ln N - (N-1)/N.
    Use: to distil best-of-N sampling.
    Not: N above the samples of a prompt (refused).
    """
    if (scope.count_S < n).any():
        raise NumericsError(
            f"best_of_n with n = {n} needs as many rewarded samples in every prompt; one has "
            f"{scope.count_S.min()}.",
            mend="Lower reward.n, or sample more per prompt.",
            param="method.weighted.reward.n",
        )

    def choose(b_N: IntArray) -> FloatArray:
        """C(b, N) / C(n, N); C(b, N) = 0 for b < N."""
        enough_N = b_N >= n
        b_N = np.where(enough_N, b_N, n)
        total_N = scope.spread(scope.count_S)
        log_N = gammaln(b_N + 1) - gammaln(b_N - n + 1) - gammaln(total_N + 1) + gammaln(total_N - n + 1)
        return np.where(enough_N, np.exp(log_N), 0.0)

    at_most_N, below_N = scope.counts_at_most(rewards_N)
    return log_positive((choose(at_most_N) - choose(below_N)) / (at_most_N - below_N))


def first_order(rewards_N: FloatArray, scope: Scope, *, beta: Beta = 1.0) -> FloatArray:
    """g = max(0, 1 + (r - mean) / beta)

    What: the linearisation of exponential.
    Use: rewards within about beta of each other; bounded influence of outliers above.
    Not: rewards far below the mean: they get exactly zero.
    """
    return log_positive(1.0 + (rewards_N - scope.spread(scope.mean(rewards_N))) / beta)


def signed_advantage(rewards_N: FloatArray, scope: Scope, *, divide_by_std: bool = True) -> FloatArray:
    """v = a A, A = (r - mean) / (std + 1e-8), or r - mean

    What: the policy-gradient baseline (GRPO). May be negative; not normalised, no f, no ESS, no guards.
    It returns the weight itself and not a log.
    Use: online, with clipped token ratios.
    Not: offline demonstrations: pushing samples down is unbounded there.
    """
    centred_N = rewards_N - scope.spread(scope.mean(rewards_N))
    return centred_N / (scope.spread(scope.std(rewards_N)) + EPSILON) if divide_by_std else centred_N


def _log_mean(scope: Scope, log_g_N: FloatArray) -> FloatArray:
    """log of the prior-weighted mean of exp(log_g), per segment, at any scale."""
    most_S = scope.max(log_g_N)
    shift_S = np.where(np.isfinite(most_S), most_S, 0.0)
    mean_S = scope.mean(np.exp(np.minimum(log_g_N - scope.spread(shift_S), 0.0)))
    return log_positive(mean_S) + shift_S
