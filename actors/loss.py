"""The objective on one micro-batch: factors of its tokens, the weighted loss, what the ratios looked like.

M  trained tokens of the micro-batch      B  its samples
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.begun import Past, log_old, log_past
from actors.forward import Forward
from modeseek_ray.objectives.collate import Batch
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.objectives.factors import TokenEvidence, token_factor
from modeseek_ray.objectives.loss import weighted_loss_sum
from modeseek_ray.objectives.ratios import clip_factor, delta_sums, mismatch_factor
from modeseek_ray.types import IntArray, Objective, StepPlan


class Share(NamedTuple):
    """A micro-batch's share of the global loss, and statistics of pi_theta / pi_old on it."""

    loss: Tensor  # float64 scalar
    ratio: DeltaSums
    balance: float = 0.0  # of the load-balancing loss, before its coefficient


def loss_share(
    objective: Objective,
    plan: StepPlan,
    forward: Forward,
    past_N: Sequence[Past] | None,
    num_tokens: int,
    num_positions: int = 0,
) -> Share:
    """`num_tokens` is the global batch's; `past_N` the rank's samples when the batch was begun, if it was.

    `num_positions` are the global batch's tokens, trained or not: a micro-batch's load-balancing loss counts
    by its share of them. The token factor, the staleness clip and the mismatch factor are multiplied; all are detached.
    A dummy's share is zero, and needs no past.
    """
    batch, scores = forward.batch, forward.scores
    log_prob_M = scores.log_prob_M.detach()
    values_B = _values(plan, forward.index_B, log_prob_M.device)
    log_past_M = None if past_N is None or forward.is_dummy else log_past(past_N, forward)
    ratio = DeltaSums()
    factor_M = None
    if not forward.is_dummy:
        evidence = TokenEvidence(
            log_prob_M,
            top_entropy_M=scores.top_entropy_M,
            log_reference_M=forward.log_reference_M,
            log_start_M=log_past_M,
        )
        parameters = {**objective.token_parameters, **plan.token_parameters}
        factor_M = token_factor(objective.token_factor, evidence, parameters)
    if past_N is not None and log_past_M is not None:
        log_ratio_M = log_prob_M - log_old(past_N, forward)
        clip = None
        if objective.clip is not None:
            clip = clip_factor(
                log_ratio_M,
                values_B[batch.sample_M],
                batch.sample_M,
                batch.num_tokens_B,
                objective.clip,
            )
            factor_M = _times(factor_M, clip.factor_M)
        if objective.mismatch is not None and batch.log_behavior_M is not None:
            mismatch = mismatch_factor(
                log_past_M - batch.log_behavior_M, batch.sample_M, batch.num_tokens_B, objective.mismatch
            )
            factor_M = _times(factor_M, mismatch.factor_M)
        ratio = delta_sums(log_ratio_M, batch.sample_M, len(batch.num_tokens_B), clip)
    loss = weighted_loss_sum(
        scores.log_prob_M,
        batch.sample_M,
        values_B,
        factor_M,
        batch.num_tokens_B,
        objective.aggregation,
        plan.denominator,
    )
    if scores.kl_M is not None:
        coefficient = 0.0 if forward.is_dummy else plan.kl_coefficient
        loss = loss + coefficient * scores.kl_M.double().sum() / num_tokens
    balance = 0.0
    if forward.balance is not None:
        # A dummy's is multiplied by zero, not left out: ZeRO-3's collectives run along its graph, too.
        own = 0 if forward.is_dummy else batch.num_positions - batch.num_padded
        share = forward.balance.double() * (own / max(num_positions, 1))
        loss = loss + objective.router_aux_loss_coef * share
        balance = float(share.detach())
    return Share(loss, ratio, balance)


def announced_gradient(
    objective: Objective, plan: StepPlan, index_B: IntArray, batch: Batch, scale: float
) -> Tensor | None:
    """What `loss_share`, times `scale`, will send back to the micro-batch's log-probabilities, [M] float32.

    None where it depends on them: then a forward pass has to come first. Autograd itself computes it, on zeros in
    their place, so that the bits are those of the backward pass.
    """
    if objective.token_factor != "none" or objective.clip is not None or objective.mismatch is not None:
        return None
    probe_M = torch.zeros(len(batch.target_M), device=batch.target_M.device, requires_grad=True)
    loss = weighted_loss_sum(
        probe_M,
        batch.sample_M,
        _values(plan, index_B, probe_M.device),
        None,
        batch.num_tokens_B,
        objective.aggregation,
        plan.denominator,
    )
    return torch.autograd.grad(loss * scale, probe_M)[0]


def _values(plan: StepPlan, index_B: IntArray, device: torch.device) -> Tensor:
    """The micro-batch's weights, float64; a dummy's is zero."""
    values_B = plan.values_N[index_B].astype(np.float64) if len(index_B) else np.zeros(1)
    return torch.from_numpy(values_B).to(device)


def _times(factor_M: Tensor | None, other_M: Tensor) -> Tensor:
    return other_M if factor_M is None else factor_M * other_M
