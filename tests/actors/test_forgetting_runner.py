"""The forgetting benchmark's single-process runner takes the service's steps: losses, weights, parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from actors.inner import parts_of
from actors.sources import probe_groups
from modeseek_ray.config import Lora, Training
from modeseek_ray.data.cursor import Cursor
from modeseek_ray.objectives.model import ScoringModel
from modeseek_ray.objectives.parameters import factor_parameters
from modeseek_ray.types import Evidence, Objective, Sample, StepPlan
from modeseek_ray.weights import Weighting, kl_coefficient, needs, observe, weigh
from tests.actors import ranks as inside
from tests.actors.conftest import random_samples
from tests.actors.ranks import Start, Trainer, relative_difference
from tests.bench.forgetting.train import BATCH, Learner, Rows, Run, Setting, summed_log_probs

STEPS, RATE = 4, 1e-3
ESS = {"ess": {"floor": 0.6, "max": 1.0, "warmup": 0.1}}
SETTINGS = {
    "sft": Setting({}, RATE),
    "mode_seeking": Setting({"preset": "mode_seeking", "likelihood": {"gamma": ESS}}, RATE),
    "anchored_kl": Setting(
        {
            "preset": "anchored",
            "likelihood": {"gamma": ESS},
            "kl": {"direction": "forward", "coefficient": 0.5},
        },
        RATE,
    ),
    "eaft": Setting({"preset": "eaft"}, RATE),
    "psft": Setting({"preset": "psft"}, RATE, batches_at_once=2),
    "lora": Setting({"preset": "mode_seeking"}, RATE, lora_rank=4),
}


@dataclass
class Course:
    losses: list[float]
    weights: list[np.ndarray]


@pytest.fixture(scope="module")
def rows() -> list[Sample]:
    return random_samples(3 * BATCH, seed=5)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_equals_the_services_trainer(
    name: str, start: Start, rows: list[Sample], tiny_dense: Path
) -> None:
    setting = SETTINGS[name]
    weighting = Weighting.model_validate(dict(setting.weighting))
    lora = None if setting.lora_rank is None else Lora(rank=setting.lora_rank, alpha=2.0 * setting.lora_rank)
    trainer = start(
        zero_stage=0,
        micro_batch_size=8,
        objective=Objective(
            token_factor=weighting.token.scheme,
            token_parameters=factor_parameters(weighting.token),
            kl_direction=None if weighting.kl is None else weighting.kl.direction,
        ),
        training=Training(lora=lora, inner_steps=setting.batches_at_once),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype="float32")
    frozen = ScoringModel(AutoModelForCausalLM.from_pretrained(tiny_dense, dtype="float32"))
    frozen = frozen.requires_grad_(False).eval()
    reference_R = summed_log_probs(frozen, rows)

    learner = Learner(model, frozen, setting, seed=0)
    run = Run(learner, setting, Rows(rows, reference_R), seed=3, steps=STEPS)
    ours = Course([], [])
    for _, step in run.finished():
        assert step is not None and run.weights is not None
        ours.losses.append(step.loss)
        ours.weights.append(run.weights.values_N)
    theirs = service(trainer, setting, weighting, rows, reference_R)

    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    for mine, yours in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(mine, yours, rtol=1e-5)
    if name in ("mode_seeking", "anchored_kl"):
        assert np.ptp(ours.weights[-1]) > 0.1  # or there was nothing to compare
    parameters = {n: p.detach().numpy() for n, p in learner.module.model.named_parameters()}
    assert relative_difference(parameters, trainer.inside(inside.parameters)[0]) < 1e-5


def service(
    trainer: Trainer, setting: Setting, weighting: Weighting, rows: Sequence[Sample], reference_R: np.ndarray
) -> Course:
    """The driver's loop (`actors/driver.py`) over a rank of the service, on the batches of the same cursor."""
    at_once = setting.batches_at_once
    cursor = Cursor(np.array([s.group for s in rows]), BATCH * at_once, seed=3, max_steps=STEPS // at_once)
    course, state, done = Course([], []), {}, 0
    for number, index_N in enumerate(cursor):
        chosen = [rows[i] for i in index_N]
        parts = parts_of(len(chosen), at_once, seed=(3, number))
        if at_once > 1:
            groups = probe_groups(chosen, lambda block: block)
            groups = asyncio.run(trainer.pool().begin(groups, parts))
            log_policy_N = np.concatenate([g.log_policy_N for g in groups if g.log_policy_N is not None])
        else:
            log_policy_N = trainer.score(chosen)
        evidence = Evidence(
            log_policy_N=log_policy_N if "policy" in needs(weighting) else None,
            log_reference_N=reference_R[index_N] if "initial" in needs(weighting) else None,
            num_tokens_N=np.array([s.num_tokens for s in chosen]),
            group_N=np.arange(len(chosen)),
        )
        weights = weigh(evidence, weighting, progress=done / STEPS, state=state or None)
        for part in parts:
            picked = [chosen[i] for i in part]
            plan = StepPlan(
                step=number,
                values_N=weights.values_N[part],
                denominator=float(sum(s.num_tokens for s in picked)),
                learning_rate=setting.learning_rate,
                kl_coefficient=kl_coefficient(weighting.kl, state),
                token_parameters=weights.token_parameters,
            )
            course.losses.append(trainer.loss(picked, plan))
            course.weights.append(weights.values_N)
            done += 1
        state = observe(weights.state)
    return course
