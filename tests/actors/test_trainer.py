"""The trainer's arithmetic, against plain PyTorch and against itself on other layouts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeseek_ray.config import Training
from modeseek_ray.types import Evidence, Objective, Sample
from modeseek_ray.weights import Weighting, weigh
from tests.actors import ranks as inside
from tests.actors.ranks import Start, Trainer, plan_for, relative_difference

LONG = Sample(row=90, token_ids_T=np.arange(5, 85, dtype=np.int32), trained_T=np.arange(80) >= 9)
GAMMAS: tuple[Any, ...] = (0.0, 0.5, {"ess": {"floor": 0.7, "max": 2.0, "warmup": 0.0}})
WEIGHTS = np.array([2.0, 0.0, 0.5, 1.0, 1.5, 0.25, 1.75, 1.0])


def test_the_driver_may_import_it_without_torch() -> None:
    code = "import sys, actors.trainer, actors.checkpoint; print({'torch', 'deepspeed', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


class TestPlainSft:
    """Weights of one are supervised fine-tuning, bit for bit."""

    def test_scoring_first_changes_no_bit(self, start: Start, samples: list[Sample]) -> None:
        hashes = []
        for score, keep_graph in ((False, "auto"), (True, "auto"), (True, "never")):
            trainer = start(keep_graph=keep_graph)
            for step in range(3):
                if score:
                    trainer.score(samples)
                loss = trainer.loss(samples, plan_for(samples, step=step))
            hashes.append((loss, trainer.sha256()))
        assert hashes[0] == hashes[1] == hashes[2]

    @pytest.mark.parametrize("zero_stage", [0, 2])
    def test_agrees_with_a_plain_loop(
        self, start: Start, samples: list[Sample], tiny_dense: Path, zero_stage: int
    ) -> None:
        trainer = start(zero_stage=zero_stage, training=Training(weight_decay=0.1, max_grad_norm=0.5))
        losses = [trainer.loss(samples, plan_for(samples, step=i)) for i in range(3)]
        expected_losses, expected = plain_loop(tiny_dense, samples, steps=3, rate=1e-3)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
        assert relative_difference(expected, trainer.inside(inside.parameters)[0]) < 1e-6


def plain_loop(
    model_path: Path, samples: Sequence[Sample], *, steps: int, rate: float
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Supervised fine-tuning as anyone would write it: one sample at a time, cross_entropy, AdamW."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    num_tokens = sum(s.num_tokens for s in samples)
    losses = []
    for _ in range(steps):
        total = 0.0
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids_T.astype(np.int64))
            labels = torch.where(torch.from_numpy(sample.trained_T), ids, -100)
            logits = model(ids[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {n: p.detach().numpy() for n, p in model.named_parameters()}


def step(
    trainer: Trainer, batch: list[Sample], gamma: Any
) -> tuple[np.ndarray, float, float, dict[str, np.ndarray]]:
    """The weights of the batch's own scores, loss, gradient norm and gradient; a rate of 0 moves nothing.

    The start is a made-up one, from which every sample is another distance away.
    """
    num_tokens_N = np.array([s.num_tokens for s in batch])
    drift_N = np.random.default_rng(len(batch)).normal(size=len(batch))
    weighting = Weighting.model_validate({"likelihood": {"scheme": "ratio_power", "gamma": gamma}})
    evidence = Evidence(trainer.score(batch), num_tokens_N * (drift_N - 5.3), num_tokens_N)
    weights = weigh(evidence, weighting, progress=0.5)
    assert weights.bound_by == ("ess" if isinstance(gamma, dict) else "fixed")
    reports = trainer.step(batch, plan_for(batch, weights.values_N, rate=0.0))
    gradient = trainer.inside(inside.captured_gradients)[0]
    return weights.values_N, sum(r.loss for r in reports), reports[0].grad_norm, gradient


class TestLayouts:
    """The same global batch, cut differently, is the same step."""

    @pytest.mark.parametrize("aggregation", ["token", "sequence"])
    def test_one_rank_equals_two_with_accumulation(
        self, start: Start, samples: list[Sample], aggregation: str
    ) -> None:
        """Scored, weighed and stepped on each layout: equal numbers of micro-batches, then one against two."""
        batches = [samples, [LONG, *(s for s in samples if s.length < 13)]]
        seen = {}
        for name, world_size, zero_stage, per_micro_batch in [
            ("one", 1, 0, 8),
            ("two x 2 x 2, ZeRO-2", 2, 2, 2),
            ("two x 2 x 2, ZeRO-3", 2, 3, 2),
        ]:
            trainer = start(
                world_size=world_size,
                zero_stage=zero_stage,
                micro_batch_size=per_micro_batch,
                objective=Objective(aggregation=aggregation),  # type: ignore[arg-type]
            )
            trainer.inside(inside.capture_gradients)
            seen[name] = [step(trainer, batch, gamma) for batch in batches for gamma in GAMMAS]
            if world_size == 2:
                counts = [sorted(-(-len(share) // 2) for share in trainer.split(batch)) for batch in batches]
                assert counts == [[2, 2], [1, 2]]
        expected = seen.pop("one")
        for values_N, _, _, _ in expected[0::3]:
            assert (values_N == 1).all()  # gamma 0
        for values_N, _, _, _ in [*expected[1::3], *expected[2::3]]:
            assert values_N.std() > 0.2
        for others in seen.values():
            for (values_N, loss, norm, gradient), other in zip(expected, others, strict=True):
                np.testing.assert_allclose(other[0], values_N, rtol=1e-6)
                assert other[1] == pytest.approx(loss, rel=1e-6)
                assert other[2] == pytest.approx(norm, rel=1e-6)
                assert relative_difference(gradient, other[3]) < 1e-6

    @pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
    def test_unequal_numbers_of_micro_batches(
        self, start: Start, samples: list[Sample], zero_stage: int
    ) -> None:
        """One long sample against six short ones, then a batch that leaves a rank with nothing."""
        short = [s for s in samples if s.length < 13]
        for batch in ([LONG, *short], [samples[0]]):
            values_N = WEIGHTS[: len(batch)]
            alone = start(micro_batch_size=None)
            expected = alone.loss(batch, plan_for(batch, values_N))
            expected_parameters = alone.inside(inside.parameters)[0]
            trainer = start(world_size=2, zero_stage=zero_stage, micro_batch_size=1)
            counts = {len(share) for share in trainer.split(batch)}
            assert len(counts) == 2
            assert trainer.loss(batch, plan_for(batch, values_N)) == pytest.approx(expected, rel=1e-6)
            assert relative_difference(expected_parameters, trainer.inside(inside.parameters)[0]) < 1e-5

    def test_zero_stages_agree_over_twenty_steps(
        self, start: Start, samples: list[Sample], tiny_moe: Path
    ) -> None:
        """An MoE model, two ranks; under ZeRO-3 no rank holds a whole parameter between uses."""
        courses = []
        for zero_stage in (0, 1, 2, 3):
            trainer = start(model=tiny_moe, world_size=2, zero_stage=zero_stage)
            if zero_stage == 3:
                assert set().union(*trainer.inside(inside.partition_status)) == {"NOT_AVAILABLE"}
            courses.append([trainer.loss(samples, plan_for(samples, WEIGHTS, step=i)) for i in range(20)])
        assert set().union(*trainer.inside(inside.partition_status)) == {"NOT_AVAILABLE"}
        assert courses[0][-1] < 0.85 * courses[0][0], "twenty steps should have learnt something"
        for course in courses[1:]:
            np.testing.assert_allclose(course, courses[0], rtol=1e-5)

    def test_padding_order_and_prompts_change_nothing(self, start: Start, samples: list[Sample]) -> None:
        plan = plan_for(samples, WEIGHTS)
        baseline = start(micro_batch_size=1)
        log_prob_N = baseline.score(samples)
        loss = baseline.loss(samples, plan)
        padded = start(micro_batch_size=8)  # all eight in one micro-batch, padded to the longest
        np.testing.assert_allclose(padded.score(samples), log_prob_N, rtol=1e-6)
        backwards = samples[::-1]
        np.testing.assert_allclose(padded.score(backwards), log_prob_N[::-1], rtol=1e-6)
        assert padded.loss(backwards, plan_for(backwards, WEIGHTS[::-1])) == pytest.approx(loss, rel=1e-6)

    def test_same_seed_and_layout_give_the_same_bits(self, start: Start, samples: list[Sample]) -> None:
        hashes = []
        for _ in range(2):
            trainer = start(world_size=2, zero_stage=3)
            for i in range(3):
                trainer.step(samples, plan_for(samples, WEIGHTS, step=i))
            hashes.append(trainer.sha256())
        assert hashes[0] == hashes[1]
