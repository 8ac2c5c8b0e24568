"""Figures of METHODS.md section 7 that only a trainer can measure: two ranks against full logits in float64."""

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

from actors.sources import probe_groups
from modeseek_ray.config import Lora, Training
from modeseek_ray.types import EvalReport, Evidence, Objective, Sample, StepReport
from modeseek_ray.weights import Weighting, weigh
from tests.actors import ranks as inside
from tests.actors.conftest import random_samples
from tests.actors.ranks import Start, Trainer, plan_for

LORA = Training(lora=Lora(rank=4, alpha=8.0))
EXPERTS = Training(lora=Lora(rank=4, alpha=8.0, target_experts=True))
PROBES = random_samples(5, seed=1)  # of unequal lengths: a mean of the ranks' means would be another number


@dataclass
class Course:
    """Three steps, evaluated before and after."""

    reports: list[StepReport]
    before: EvalReport
    after: EvalReport
    distances: tuple[float, float]


def train(trainer: Trainer, samples: Sequence[Sample], rate: float = 1e-2) -> Course:
    async def run() -> Course:
        pool = trainer.pool()
        groups, probes = (probe_groups(s, lambda block: block) for s in (samples, PROBES))
        await pool.remember_start(probes)
        at_start = await pool.distance_from_start()
        before = await pool.evaluate(probes, kl=True)
        reports = [await pool.step(groups, plan_for(samples, step=i, rate=rate)) for i in range(3)]
        after = await pool.evaluate(probes, kl=True)
        return Course(reports, before, after, (at_start, await pool.distance_from_start()))

    return asyncio.run(run())


@dataclass
class Plain:
    """Means over all trained tokens of some samples, from the model's own full logits."""

    nll: float
    entropy: float
    kl: float
    kl_reverse: float


def plain(now: Path, start: Path, samples: Sequence[Sample]) -> Plain:
    log_policy, log_start = (_log_probs(path, samples) for path in (now, start))
    target = torch.cat([torch.from_numpy(s.token_ids_T[s.trained_T].astype(np.int64)) for s in samples])

    def mean(values_MV: torch.Tensor) -> float:
        return float(values_MV.sum(-1).mean())

    return Plain(
        nll=-float(log_policy.gather(1, target[:, None]).mean()),
        entropy=-mean(log_policy.exp() * log_policy),
        kl=mean(log_start.exp() * (log_start - log_policy)),
        kl_reverse=mean(log_policy.exp() * (log_policy - log_start)),
    )


def _log_probs(path: Path, samples: Sequence[Sample]) -> torch.Tensor:
    """At every trained token, over the whole vocabulary, [M, V] float64."""
    from transformers import AutoModelForCausalLM

    # Experts multiply in float32 at most.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = []
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.token_ids_T.astype(np.int64))[None]).logits[0].double()
        rows.append(logits.log_softmax(-1)[np.flatnonzero(sample.trained_T) - 1])
    return torch.cat(rows)


def distance(now: Path, start: Path) -> float:
    """Between two directories of weights."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (now, start)]
    pairs = zip(*(m.parameters() for m in models), strict=True)
    return float(sum(float(((a - b).detach() ** 2).sum()) for a, b in pairs) ** 0.5)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("tiny_dense", {"zero_stage": 0}),
    ("tiny_dense", {"zero_stage": 2}),
    ("tiny_moe", {"zero_stage": 3}),
    ("tiny_dense", {"zero_stage": 3, "training": LORA}),
    ("tiny_moe", {"zero_stage": 2, "training": EXPERTS}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_ranks_against_the_full_logits(
    start: Start,
    samples: list[Sample],
    name: str,
    options: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model: Path = request.getfixturevalue(name)
    trainer = start(model=model, world_size=2, **options)
    course = train(trainer, samples)
    trainer.each("export", str(tmp_path / "now"))
    begin, end = plain(model, model, PROBES), plain(tmp_path / "now", model, PROBES)

    assert course.reports[0].entropy == pytest.approx(plain(model, model, samples).entropy, rel=1e-5)
    assert (course.before.kl_nats, course.before.kl_reverse_nats) == pytest.approx((0, 0), abs=1e-6)
    assert course.before.entropy == pytest.approx(begin.entropy, rel=1e-5)
    assert course.after.nll == pytest.approx(end.nll, rel=1e-5)
    assert course.after.entropy == pytest.approx(end.entropy, rel=1e-5)
    assert course.after.kl_nats == pytest.approx(end.kl, rel=1e-4)
    assert course.after.kl_reverse_nats == pytest.approx(end.kl_reverse, rel=1e-4)
    assert end.kl > 1e-3
    assert abs(end.kl - end.kl_reverse) > 1e-4 * end.kl, "the directions can be told apart"

    assert course.distances[0] == 0
    assert course.distances[1] == pytest.approx(distance(tmp_path / "now", model), rel=1e-5)
    assert course.distances[1] > 1e-2


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradient_norm_as_the_optimizer_gets_it(start: Start, samples: list[Sample], zero_stage: int) -> None:
    """Measured inside the optimizer's own step, over both ranks; limits above and below the norm."""
    for limit, binds in ((1e-2, True), (1e3, False)):
        trainer = start(world_size=2, zero_stage=zero_stage, training=Training(max_grad_norm=limit))
        trainer.inside(inside.capture_norms)
        report = train(trainer, samples).reports[-1]
        squares = trainer.inside(inside.captured_square)
        handed = np.sqrt(squares[0] if zero_stage == 0 else sum(squares))
        assert report.grad_norm_clipped == pytest.approx(handed, rel=1e-4)
        assert report.grad_norm_clipped == pytest.approx(limit if binds else report.grad_norm, rel=1e-3)
        assert report.grad_norm > 1e-2


def test_distance_is_from_the_start_also_after_a_resumption(
    start: Start, samples: list[Sample], tmp_path: Path
) -> None:
    trainer = start(world_size=2)
    moved = train(trainer, samples).distances[1]
    trainer.each("save", str(tmp_path))
    resumed = start(world_size=2)
    resumed.each("load", str(tmp_path))
    assert resumed.each("distance_from_start") == pytest.approx([moved, moved], rel=1e-6)


def test_in_bfloat16_the_distance_is_of_the_weights_that_are_computed_with(
    start: Start, samples: list[Sample]
) -> None:
    """A rate of 1e-6 moves the float32 master copy, and no weight of one by bfloat16's resolution."""
    still = train(start(dtype="bfloat16", world_size=2), samples, rate=1e-9).distances[1]
    moved = train(start(dtype="bfloat16", world_size=2), samples, rate=1e-2).distances[1]
    assert still < 1e-3 < moved


@pytest.mark.parametrize("options", [{"zero_stage": 2}, {"zero_stage": 3, "training": LORA}])
def test_kl_of_single_samples(
    start: Start, samples: list[Sample], tiny_dense: Path, tmp_path: Path, options: Any
) -> None:
    """`gamma: {per_sample: {distance: kl}}`: each sample's own KL(pi_0 || pi), whichever rank holds it."""
    trainer = start(world_size=2, objective=Objective(sample_kl=True), **options)
    groups = probe_groups(samples, lambda block: block)

    async def run() -> tuple[Any, Any]:
        pool = trainer.pool()
        first = await pool.begin(groups)
        for i in range(3):
            await pool.step(groups, plan_for(samples, step=i, rate=1e-2))
        await pool.export(tmp_path / "now")
        return first, await pool.begin(groups)

    first, begun = asyncio.run(run())
    np.testing.assert_allclose(np.concatenate([g.distance_N for g in first]), 0, atol=1e-6)
    expected_N = [plain(tmp_path / "now", tiny_dense, [s]).kl for s in samples]
    np.testing.assert_allclose(np.concatenate([g.distance_N for g in begun]), expected_N, rtol=1e-4)
    assert max(expected_N) > 1.2 * min(expected_N) > 0


class TestFirstOrder:
    """`approximation: first_order`: sum_t (ratio_t - 1) of the very ratio that `of` names."""

    @pytest.mark.parametrize("of", ["policy_over_initial", "initial_over_policy"])
    @pytest.mark.parametrize("options", [{"zero_stage": 2}, {"zero_stage": 3, "training": LORA}])
    def test_against_the_start_on_full_logits(
        self, start: Start, samples: list[Sample], tiny_dense: Path, tmp_path: Path, of: Any, options: Any
    ) -> None:
        trainer = start(world_size=2, objective=Objective(delta_of=of), **options)
        groups = probe_groups(samples, lambda block: block)

        async def run() -> tuple[Any, StepReport]:
            pool = trainer.pool()
            [first] = [await pool.begin(groups)]
            assert np.abs(np.concatenate([g.sum_delta_N for g in first])).max() < 1e-5
            for i in range(3):
                await pool.step(groups, plan_for(samples, step=i, rate=1e-2))
            await pool.export(tmp_path / "now")
            begun = await pool.begin(groups)
            return begun, await pool.step(begun, plan_for(samples, step=3, rate=0.0))

        begun, report = asyncio.run(run())
        now, then = (
            [_log_probs(path, [s]).gather(1, _targets(s)).squeeze(1) for s in samples]
            for path in (tmp_path / "now", tiny_dense)
        )
        sign = 1 if of == "policy_over_initial" else -1
        delta = [torch.expm1(sign * (a - b)) for a, b in zip(now, then, strict=True)]
        found_N = np.concatenate([g.sum_delta_N for g in begun])
        np.testing.assert_allclose(found_N, [float(d.sum()) for d in delta], rtol=1e-4, atol=1e-5)
        everything = torch.cat(delta)
        assert report.figures["weighting/mean_abs_delta"] == pytest.approx(
            float(everything.abs().mean()), rel=1e-4
        )
        assert report.figures["weighting/std_delta"] == pytest.approx(
            float(everything.std(correction=0)), rel=1e-4
        )

    @pytest.mark.parametrize(
        ("approximation", "expected"), [("exact", [1.32, 0.75, 1.0]), ("first_order", [1.30, 1.0, 1.0])]
    )
    def test_numbers_of_methods_section_4(
        self, start: Start, samples: list[Sample], approximation: str, expected: list[float]
    ) -> None:
        """Token ratios (1.1, 1.2), (1.5, .5) and (1, 1) to a sampler, on two ranks; gamma 1, weights unchanged."""
        ratios = np.log([[1.1, 1.2], [1.5, 0.5], [1.0, 1.0]])
        trainer = start(world_size=2, objective=Objective(delta_of="policy_over_data"))
        two = [dataclasses.replace(s, trained_T=np.arange(s.length) >= s.length - 2) for s in samples[:3]]
        single = [
            dataclasses.replace(s, trained_T=np.arange(s.length) == s.length - 2 + k)
            for s in two
            for k in (0, 1)
        ]
        log_prob_NT = trainer.score(single).reshape(3, 2)
        drawn = []
        for sample, log_behavior in zip(two, log_prob_NT - ratios, strict=True):
            log_behavior_T = np.zeros(sample.length, dtype=np.float32)
            log_behavior_T[-2:] = log_behavior
            total = float(log_behavior.sum())
            drawn.append(dataclasses.replace(sample, log_behavior_T=log_behavior_T, log_behavior=total))
        begun = asyncio.run(trainer.pool().begin(probe_groups(drawn, lambda block: block)))
        weighting = Weighting.model_validate(
            {
                "likelihood": {
                    "scheme": "ratio_power",
                    "of": "policy_over_data",
                    "gamma": 1.0,
                    "length_exponent": 0,
                    "approximation": approximation,
                },
                "normalise": False,
            }
        )
        np.testing.assert_allclose(weigh(Evidence.of(begun), weighting).values_N, expected, rtol=1e-4)


def _targets(sample: Sample) -> torch.Tensor:
    return torch.from_numpy(sample.token_ids_T[sample.trained_T].astype(np.int64))[:, None]
