"""What a step announces to its forward passes is what its loss sends back, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.forward import Forward
from actors.loss import announced_gradient, loss_share
from modeseek_ray.objectives.collate import collate
from modeseek_ray.objectives.head import KEPT_BYTES
from modeseek_ray.objectives.logprobs import TokenScores
from modeseek_ray.types import Mismatch, Objective, RatioClip, Sample, StepPlan
from tests.actors import ranks as inside
from tests.actors.ranks import Start, plan_for

VALUES = np.array([0.3, 2.0, 1 / 3])


def micro_batch(index_B: list[int]) -> Forward:
    """Three samples of 4, 5 and 6 tokens, those of `index_B` of them; an empty one is a dummy."""
    samples = [
        Sample(row=i, token_ids_T=np.arange(4 + i, dtype=np.int32), trained_T=np.arange(4 + i) > 0)
        for i in range(3)
    ]
    batch = collate(samples, index_B or [0], pad_id=0)
    log_prob_M = (
        -torch.rand(len(batch.target_M), generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    scores = TokenScores(log_prob_M, torch.ones(len(log_prob_M), dtype=torch.bool))
    return Forward(np.array(index_B, dtype=np.int64), batch, scores)


@pytest.mark.parametrize("index_B", [[0, 1, 2], [2, 0], []])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "sum"])
@pytest.mark.parametrize("world_size", [1.0, 3.0])
def test_it_is_what_the_loss_sends_back(index_B: list[int], aggregation: str, world_size: float) -> None:
    objective = Objective(aggregation=aggregation)  # type: ignore[arg-type]
    plan = StepPlan(step=0, values_N=VALUES, denominator=7.0, learning_rate=0.0)
    forward = micro_batch(index_B)
    announced_M = announced_gradient(objective, plan, forward.index_B, forward.batch, world_size)
    (loss_share(objective, plan, forward, None, 12).loss * world_size).backward()
    assert announced_M is not None and torch.equal(announced_M, forward.scores.log_prob_M.grad)
    assert bool(announced_M.any()) == bool(index_B)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(token_factor="dft"),
        Objective(clip=RatioClip()),
        Objective(mismatch=Mismatch()),
    ],
)
def test_nothing_is_announced_that_depends_on_the_log_probabilities(objective: Objective) -> None:
    plan = StepPlan(step=0, values_N=VALUES, denominator=7.0, learning_rate=0.0)
    forward = micro_batch([0, 1, 2])
    assert announced_gradient(objective, plan, forward.index_B, forward.batch, 1.0) is None


@pytest.mark.slow
def test_a_step_projects_onto_the_vocabulary_once(start: Start, samples: list[Sample]) -> None:
    """Micro-batches that each are one chunk: as many projections as micro-batches, on every rank."""
    for world_size, per_micro_batch, micro_batches in [(1, 4, 2), (2, 2, 2)]:
        trainer = start(world_size=world_size, zero_stage=2, micro_batch_size=per_micro_batch)
        trainer.inside(inside.count_projections, 0)
        trainer.step(samples, plan_for(samples))
        assert set(trainer.inside(inside.projections)) == {micro_batches}
    trainer.inside(inside.count_projections, KEPT_BYTES)
    trainer.score(samples)  # its graphs are kept, and so are its chunks
    trainer.step(samples, plan_for(samples))
    assert set(trainer.inside(inside.projections)) == {micro_batches}
