"""The weighted loss. It sums; `denominator` is the one division, by a global count.

M  predicted tokens of a micro-batch      N  its samples
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def weighted_loss_sum(
    log_prob_M: Tensor,
    sample_M: Tensor,
    values_N: Tensor,
    factor_M: Tensor | None,
    num_tokens_N: Tensor,
    aggregation: Literal["token", "sequence", "sum"],
    denominator: float,
) -> Tensor:
    """This micro-batch's share of  - sum_i v_i sum_t c_it log p_it / D,  a float64 scalar.

    D is the number of trained tokens of the *global* batch (`token`), or its number of samples, with
    the inner sum divided by T_i (`sequence`) or whole (`sum`): shares of all micro-batches and ranks add up to the
    loss, and so do their gradients. Never divide by the sum of v or c (METHODS.md section 1).

    `values_N` are the samples' weights v in the order `sample_M` refers to, `factor_M` the token
    factors c (None = 1). No gradient flows through either.
    """
    coefficient_N = values_N.detach().double()
    if aggregation == "sequence":
        coefficient_N = coefficient_N / num_tokens_N.clamp(min=1)
    coefficient_M = coefficient_N[sample_M]
    if factor_M is not None:
        coefficient_M = coefficient_M * factor_M.detach()
    return -(coefficient_M * log_prob_M).sum() / denominator


def sum_by_sample(per_token_M: Tensor, sample_M: Tensor, num_samples: int) -> Tensor:
    """Sum a per-token column over each sample's tokens, [num_samples] float64, detached."""
    total_N = torch.zeros(num_samples, dtype=torch.float64, device=per_token_M.device)
    return total_N.index_add_(0, sample_M, per_token_M.detach().double())
