"""Clipped token ratios: what a sample counts for once the policy is no longer the one that wrote it.

    M  predicted tokens of a micro-batch      B  its samples

Pure functions of log ratios, detached: no gradient flows through a factor. Two corrections, composed by
multiplication (METHODS.md section 4):

* staleness, rho = pi_theta / pi_old, `clip_factor`.
* mismatch, pi_old(trainer) / pi_sampler(engine), `mismatch_factor`.

Which policy pi_old is for a sample that older weights wrote is the caller's business, and README.md's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modeseek_ray.objectives.deltas import DELTA_LIMIT, DeltaSums
from modeseek_ray.objectives.loss import sum_by_sample
from modeseek_ray.types import Mismatch, RatioClip


class Factor(NamedTuple):
    """A token factor and where its bounds bound, each [M]."""

    factor_M: Tensor  # float32
    low_M: Tensor  # bool: the lower bound changed it
    high_M: Tensor


@torch.no_grad()
def clip_factor(
    log_ratio_M: Tensor, values_M: Tensor, sample_M: Tensor, num_tokens_B: Tensor, clip: RatioClip
) -> Factor:
    """c_t from log rho_t; `values_M` is the weight v of the token's sample, whose sign `ppo` goes by.

    `ppo` is the gradient of min(rho v, clamp(rho) v): rho itself, or zero where moving on would only
    widen a ratio that is out of bounds on the side that v pushes to. A weight of zero counts as positive.
    """
    ratio_M = _level(log_ratio_M, sample_M, num_tokens_B, clip.level).exp()
    low_M, high_M = ratio_M < 1 - clip.low, ratio_M > 1 + clip.high
    if clip.scheme == "clamp":
        return Factor(ratio_M.clamp(1 - clip.low, 1 + clip.high), low_M, high_M)
    low_M, high_M = low_M & (values_M < 0), high_M & (values_M >= 0)
    return Factor(ratio_M.masked_fill(low_M | high_M, 0.0), low_M, high_M)


@torch.no_grad()
def mismatch_factor(
    log_ratio_M: Tensor, sample_M: Tensor, num_tokens_B: Tensor, mismatch: Mismatch
) -> Factor:
    """The truncated (`tis`) or masked (`mis`) ratio; 1 where `log_ratio_M` is NaN: no sampler is known."""
    ratio_M = _level(log_ratio_M, sample_M, num_tokens_B, mismatch.level).exp()
    low_M, high_M = ratio_M < mismatch.low, ratio_M > mismatch.high  # False for NaN
    if mismatch.scheme == "tis":
        low_M = torch.zeros_like(low_M)
        factor_M = ratio_M.clamp(max=mismatch.high)
    else:
        factor_M = ratio_M.masked_fill(low_M | high_M, 0.0)
    return Factor(torch.where(log_ratio_M.isnan(), 1.0, factor_M), low_M, high_M)


@torch.no_grad()
def delta_sums(
    log_ratio_M: Tensor, sample_M: Tensor, num_samples: int, factor: Factor | None = None
) -> DeltaSums:
    """Statistics of delta = ratio - 1, in float64, over the tokens whose log ratio is known (not NaN).

    Always of single tokens, whatever the level the ratio is used at. A sample is known in all its tokens
    or in none.
    """
    known_M = ~log_ratio_M.isnan()
    log_M, sample_M = log_ratio_M[known_M].double(), sample_M[known_M]
    if len(log_M) == 0:
        return DeltaSums()
    delta_M = log_M.expm1()
    sum_B = sum_by_sample(delta_M, sample_M, num_samples).abs()
    squares_B = sum_by_sample(delta_M.square(), sample_M, num_samples)
    none_M = torch.zeros_like(known_M)
    columns = {
        "num_samples": torch.bincount(sample_M, minlength=num_samples) > 0,
        "delta": delta_M,
        "abs_delta": delta_M.abs(),
        "squared_delta": delta_M.square(),
        "abs_sum_delta": sum_B,
        "num_far": (sum_B > DELTA_LIMIT) | (squares_B > DELTA_LIMIT),
        "num_clipped_low": none_M if factor is None else factor.low_M,
        "num_clipped_high": none_M if factor is None else factor.high_M,
        "k3": delta_M - log_M,
        "num_over_two": log_M.abs() > math.log(2),
    }
    totals = [column.sum(dtype=torch.float64) for column in columns.values()]
    largest = [delta_M.abs().max(), sum_B.max(), squares_B.max()]
    *sums, max_abs_delta, max_abs_sum_delta, max_sum_squared_delta = torch.stack(totals + largest).tolist()
    found = {k: int(v) if k.startswith("num_") else v for k, v in zip(columns, sums, strict=True)}
    return DeltaSums(
        num_tokens=len(log_M),
        max_abs_delta=max_abs_delta,
        max_abs_sum_delta=max_abs_sum_delta,
        max_sum_squared_delta=max_sum_squared_delta,
        **found,
    )


def _level(log_ratio_M: Tensor, sample_M: Tensor, num_tokens_B: Tensor, level: str) -> Tensor:
    """The log ratio each token is judged by: its own, or the mean over its sample's tokens."""
    if level == "token":
        return log_ratio_M
    mean_B = sum_by_sample(log_ratio_M, sample_M, len(num_tokens_B)) / num_tokens_B.clamp(min=1)
    return mean_B[sample_M].to(log_ratio_M.dtype)
