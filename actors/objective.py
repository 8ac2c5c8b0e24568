"""From a job's method to what its trainers apply to each token."""

from __future__ import annotations

from modeseek_ray.config import JobConfig
from modeseek_ray.objectives.parameters import Mis, Tis, factor_parameters
from modeseek_ray.types import Mismatch, Objective, RatioClip
from modeseek_ray.weights import first_order_ratio, needs


def objective_of(config: JobConfig) -> Objective:
    """The part of the method that the trainer applies: token factors, clips, KL, routes, aggregation."""
    weighting, online = config.weighting, config.online
    clip = None if online is None else online.effective_clip
    mismatch = None if online is None else online.mismatch
    return Objective(
        aggregation=config.training.aggregation,
        token_factor=weighting.token.scheme,
        token_parameters=factor_parameters(weighting.token),
        kl_direction=None if weighting.kl is None else weighting.kl.direction,
        temperature=1.0 if online is None else online.rollout.temperature,
        clip=None if clip is None else RatioClip(**clip.model_dump()),
        mismatch=None if mismatch is None else _mismatch(mismatch),
        routing_replay=config.routing_replay,
        router_aux_loss_coef=config.training.router_aux_loss_coef,
        delta_of=first_order_ratio(weighting),
        sample_kl="distance" in needs(weighting),
    )


def _mismatch(section: Tis | Mis) -> Mismatch:
    if isinstance(section, Tis):
        return Mismatch("tis", low=0.0, high=section.cap, level=section.level)
    return Mismatch("mis", low=section.low, high=section.high, level=section.level)
