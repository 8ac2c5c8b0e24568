"""Several steps on one batch: what they are compared with, clips, mismatch; against plain PyTorch and other layouts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.sources import probe_groups
from modeseek_ray.config import Lora, Training
from modeseek_ray.errors import ConfigError, DataError
from modeseek_ray.types import Group, Mismatch, Objective, RatioClip, Sample, StepReport
from tests.actors import ranks as inside
from tests.actors.ranks import Start, Trainer, plan_for, relative_difference

VALUES = np.array([2.0, -1.0, 0.5, 1.0, -1.5, 0.25, 1.75, 1.0])  # signed: both bounds of `ppo` bind
HALVES = (np.arange(0, 4), np.arange(4, 8))
TIGHT = RatioClip("ppo", low=0.02, high=0.02)
LORA = Training(lora=Lora(rank=4, alpha=8.0))


@dataclass
class Course:
    """What became of a batch: its groups after `begin`, and a report per step."""

    groups: list[Group]
    reports: list[StepReport]


def run(
    trainer: Trainer,
    samples: Sequence[Sample],
    parts: Sequence[np.ndarray],
    *,
    rate: float = 1e-2,
    begins: bool = True,
    batches: int = 1,
    first_step: int = 0,
) -> Course:
    """`begin` the batch, then a step on each part of it."""

    async def train() -> Course:
        pool = trainer.pool()
        reports = []
        for batch in range(batches):
            groups = probe_groups(samples, lambda block: block)
            groups = await (pool.begin(groups, _distinct(parts)) if begins else pool.score(groups))
            for i, part in enumerate(parts):
                chosen = [samples[j] for j in part]
                plan = plan_for(chosen, VALUES[part], step=first_step + batch * len(parts) + i, rate=rate)
                reports.append(await pool.step([groups[j] for j in part], plan))
        return Course(groups, reports)

    return asyncio.run(train())


def _distinct(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Without those that come again, in a second pass over the batch."""
    return list({part.tobytes(): part for part in parts}.values())


class TestOnPolicy:
    """One step per batch: the policy is its own past, and no clip changes a bit."""

    @pytest.mark.parametrize(
        ("world_size", "options"),
        [
            (1, {"zero_stage": 0}),
            (2, {"zero_stage": 1}),
            (2, {"zero_stage": 2, "gradient_checkpointing": True}),
            (2, {"zero_stage": 2, "keep_graph": "never"}),
            (2, {"zero_stage": 3}),
            (1, {"zero_stage": 3, "training": LORA}),
            (1, {"zero_stage": 2, "dtype": "bfloat16"}),
            (2, {"zero_stage": 3, "dtype": "bfloat16"}),
        ],
    )
    def test_clipping_changes_no_bit(
        self, start: Start, samples: list[Sample], tiny_moe: Path, world_size: int, options: dict[str, Any]
    ) -> None:
        everything = [np.arange(8)]
        plain = start(model=tiny_moe, world_size=world_size, **options)
        expected = run(plain, samples, everything, begins=False, batches=2)
        expected_sha256 = plain.sha256()
        for clip in (RatioClip("ppo", 0.0, 0.0), RatioClip("clamp", 0.0, 0.0, "sequence")):
            clipped = start(model=tiny_moe, world_size=world_size, objective=Objective(clip=clip), **options)
            found = run(clipped, samples, everything, batches=2)
            assert clipped.sha256() == expected_sha256
            assert [r.loss for r in found.reports] == [r.loss for r in expected.reports]
            for report in found.reports:
                assert report.figures["ratio/max_abs_delta"] == 0
                assert report.figures["ratio/clipped_high"] == 0


class TestInnerSteps:
    @pytest.mark.parametrize(
        "objective",
        [
            Objective(clip=TIGHT),
            Objective(clip=RatioClip("clamp", 0.02, 0.02)),
            Objective(clip=dataclasses.replace(TIGHT, level="sequence")),
            Objective(token_factor="psft", token_parameters={"clip": 0.02}),
        ],
        ids=["ppo", "clamp", "sequence", "psft"],
    )
    def test_agree_with_a_plain_loop(
        self, start: Start, samples: list[Sample], tiny_dense: Path, objective: Objective
    ) -> None:
        """The surrogate by autograd, one sample at a time; ratios move by more than the bounds."""
        trainer = start(objective=objective, training=Training(max_grad_norm=1e9, inner_steps=4))
        course = run(trainer, samples, [*HALVES, *HALVES])
        expected, moved = plain_inner_steps(tiny_dense, samples, objective, [*HALVES, *HALVES], rate=1e-2)
        assert course.reports[0].figures["ratio/max_abs_delta"] == pytest.approx(0, abs=1e-5)
        assert course.reports[-1].figures["ratio/max_abs_delta"] == pytest.approx(moved, rel=1e-3)
        if objective.clip is not None:
            assert course.reports[-1].figures["ratio/clipped_high"] > 0
        assert relative_difference(expected, trainer.inside(inside.parameters)[0]) < 1e-5

    def test_one_rank_equals_two_with_accumulation(self, start: Start, samples: list[Sample]) -> None:
        """Mini-batches of a rank's samples, some of which leave a rank with nothing to do."""
        parts = [np.array([0, 1, 2, 3]), np.array([4]), np.array([5, 6, 7])]
        seen: list[tuple[Course, dict[str, np.ndarray]]] = []
        for world_size, zero_stage, per_micro_batch in [(1, 0, 8), (2, 2, 2), (2, 3, 2)]:
            trainer = start(
                world_size=world_size,
                zero_stage=zero_stage,
                micro_batch_size=per_micro_batch,
                objective=Objective(clip=TIGHT),
            )
            course = run(trainer, samples, parts)
            seen.append((course, trainer.inside(inside.parameters)[0]))
        (one, one_parameters), *others = seen
        assert one.reports[-1].figures["ratio/clipped_high"] > 0
        for course, parameters in others:
            for report, expected in zip(course.reports, one.reports, strict=True):
                assert report.loss == pytest.approx(expected.loss, rel=1e-5)
                assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
                assert report.figures == pytest.approx(expected.figures, rel=1e-4, abs=1e-5)
            assert relative_difference(one_parameters, parameters) < 1e-5

    def test_equal_samples_have_a_past_each(self, start: Start, samples: list[Sample]) -> None:
        """Two answers of the same words, whose log-probabilities differ in rounding: each has its own past."""
        [found] = start().inside(inside.pasts_of, [samples[0], samples[1], samples[0]], [-1.0, -2.0, -3.0])
        assert found == [-1.0, -2.0, -3.0]

    def test_what_cannot_be_compared_is_refused(
        self, start: Start, samples: list[Sample], tiny_dense: Path, tmp_path: Path
    ) -> None:
        trainer = start(objective=Objective(clip=TIGHT))
        run(trainer, samples[:4], [np.arange(4)])
        with pytest.raises(RuntimeError, match="begin"):
            trainer.step(samples[4:], plan_for(samples[4:]))
        noisy = inside.with_config(tiny_dense, tmp_path / "noisy", attention_dropout=0.5)
        with pytest.raises(ConfigError, match="dropout"):
            start(model=noisy, objective=Objective(clip=TIGHT))
        with pytest.raises(ConfigError, match="graph of a whole batch"):
            start(keep_graph="always", training=Training(inner_steps=2))


def plain_inner_steps(
    model_path: Path,
    samples: Sequence[Sample],
    objective: Objective,
    parts: Sequence[np.ndarray],
    *,
    rate: float,
) -> tuple[dict[str, np.ndarray], float]:
    """PPO as anyone would write it. Returns the weights, and the largest |ratio - 1| the last step saw."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def log_probs(sample: Sample) -> Tensor:
        ids = torch.from_numpy(sample.token_ids_T.astype(np.int64))
        log_prob = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        chosen: Tensor = log_prob[torch.from_numpy(sample.trained_T[1:])]
        return chosen

    with torch.no_grad():
        old = [log_probs(sample) for sample in samples]
    moved = 0.0
    for part in parts:
        num_tokens = sum(samples[j].num_tokens for j in part)
        moved = 0.0
        for j in part:
            ratio = (log_probs(samples[j]) - old[j]).exp()
            moved = max(moved, float((ratio.detach() - 1).abs().max()))
            (-surrogate(objective, ratio, float(VALUES[j])) / num_tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, moved


def surrogate(objective: Objective, ratio: Tensor, value: float) -> Tensor:
    """What the gradient is taken of, summed over a sample's tokens."""
    clip = objective.clip
    if clip is None:
        high = 1 + objective.token_parameters["clip"]
        return value * (ratio * (ratio <= high)).sum()
    low, high = 1 - clip.low, 1 + clip.high
    if clip.scheme == "clamp":
        return value * (ratio.detach().clamp(low, high) * ratio.log()).sum()
    if clip.level == "sequence":  # length-normalised ratio, once per token of the sample
        ratio = ratio.log().mean().exp().expand(len(ratio))
    return torch.minimum(ratio * value, ratio.clamp(low, high) * value).sum()


class TestMismatch:
    def sampled(self, trainer: Trainer, samples: Sequence[Sample], log_ratio: float) -> list[Sample]:
        """Samples of one trained token, that a sampler drew with exp(-log_ratio) times the trainer's probability."""
        one = [dataclasses.replace(s, trained_T=np.arange(s.length) == s.length - 1) for s in samples]
        log_prob_N = trainer.score(one)
        return [
            dataclasses.replace(s, log_behavior_T=np.where(s.trained_T, p - log_ratio, 0).astype(np.float32))
            for s, p in zip(one, log_prob_N, strict=True)
        ]

    @pytest.mark.parametrize(
        ("mismatch", "factor", "low", "high"),
        [
            (Mismatch("tis", high=2.0), 2.0, 0.0, 1.0),
            (Mismatch("mis", low=0.5, high=2.5), 0.0, 0.0, 1.0),
            (Mismatch("mis", low=0.5, high=5.0, level="sequence"), 3.0, 0.0, 0.0),
        ],
    )
    def test_multiplies_each_tokens_loss(
        self, start: Start, samples: list[Sample], mismatch: Mismatch, factor: float, low: float, high: float
    ) -> None:
        objective = Objective(mismatch=mismatch, clip=RatioClip(), delta_of="policy_over_data")
        trainer = start(objective=objective, world_size=2)
        drawn = self.sampled(trainer, samples, np.log(3.0))
        log_prob_N = trainer.score(drawn)
        course = run(trainer, drawn, [np.arange(8)])
        [report] = course.reports
        assert report.loss == pytest.approx(-factor * (VALUES * log_prob_N).sum() / 8, rel=1e-5)
        sum_delta_N = np.concatenate([g.sum_delta_N for g in course.groups if g.sum_delta_N is not None])
        np.testing.assert_allclose(sum_delta_N, np.full(8, 2.0), rtol=1e-5)  # 3 - 1
        figures = report.figures
        assert figures["mismatch/mean_abs_delta"] == pytest.approx(2.0, rel=1e-5)
        assert figures["mismatch/kl_k3"] == pytest.approx(2 - np.log(3), rel=1e-5)
        assert (figures["mismatch/over_two"], figures["mismatch/far_samples"]) == (1.0, 1.0)
        assert (figures["mismatch/clipped_low"], figures["mismatch/clipped_high"]) == (low, high)
        assert figures["ratio/max_abs_delta"] == 0

    @pytest.mark.parametrize(
        ("mismatch", "factor_of_stale", "factor_of_fresh"),
        [
            (None, np.where(VALUES > 0, 0.0, 3.0), 1.0),  # clipped by what the older weights said: rho = 3
            (
                Mismatch("tis", high=2.0),
                np.full(8, 2.0),
                2.0,
            ),  # decoupled: rho = 1, all of it in the mismatch
        ],
    )
    def test_samples_that_older_weights_wrote(
        self,
        start: Start,
        samples: list[Sample],
        mismatch: Mismatch | None,
        factor_of_stale: np.ndarray,
        factor_of_fresh: float,
    ) -> None:
        trainer = start(objective=Objective(mismatch=mismatch, clip=RatioClip()))
        drawn = [
            dataclasses.replace(s, weight_version=int(i % 2))
            for i, s in enumerate(self.sampled(trainer, samples, np.log(3.0)))
        ]
        log_prob_N = trainer.score(drawn)
        course = run(trainer, drawn, [np.arange(8)], first_step=1)
        factor_N = np.where(np.arange(8) % 2 == 0, factor_of_stale, factor_of_fresh)
        assert course.reports[0].loss == pytest.approx(-(factor_N * VALUES * log_prob_N).sum() / 8, rel=1e-5)
        expected = 2.0 if mismatch is None else 0.0
        assert course.reports[0].figures["ratio/max_abs_delta"] == pytest.approx(expected, rel=1e-5)
        lost = [dataclasses.replace(s, log_behavior_T=None) for s in drawn]
        with pytest.raises(DataError, match="row 0 does not carry log-probabilities"):
            run(trainer, lost, [np.arange(8)], first_step=1)

    def test_samples_without_a_known_sampler(self, start: Start, samples: list[Sample]) -> None:
        """Replay rows, which nobody sampled, count as they are; others are refused by row."""
        trainer = start(objective=Objective(mismatch=Mismatch("tis", high=2.0)))
        drawn = self.sampled(trainer, samples, np.log(3.0))
        drawn[5] = dataclasses.replace(drawn[5], log_behavior_T=None, is_replay=True)
        log_prob_N = trainer.score(drawn)
        [report] = run(trainer, drawn, [np.arange(8)]).reports
        factor_N = np.where(np.arange(8) == 5, 1.0, 2.0)
        assert report.loss == pytest.approx(-(factor_N * VALUES * log_prob_N).sum() / 8, rel=1e-5)
        drawn[3] = dataclasses.replace(drawn[3], log_behavior_T=None)
        with pytest.raises(DataError, match="row 3 does not carry log-probabilities of its sampler"):
            run(trainer, drawn, [np.arange(8)])
