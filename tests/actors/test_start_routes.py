"""R0: the policy scored under the experts that the frozen start asks, and nothing else under them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.attempt import Attempt
from actors.attempt_spec import AttemptSpec
from actors.cluster import RayPlacement
from actors.commands.preflight import refuse_replay_without_experts
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement, LocalWorker
from actors.reference import ReferenceModel, ScoringSpec
from actors.scorers import ScorerPool
from actors.scoring import scores_of
from actors.sources import probe_groups
from modeseek_ray.config import Resources, parse_config
from modeseek_ray.errors import ConfigError, DataError, ModelError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.reports.results import read_metrics
from modeseek_ray.types import FloatArray, Group, Objective, RatioClip, Sample
from tests.actors import ranks as inside
from tests.actors.conftest import random_samples
from tests.actors.ranks import Start, Trainer, plan_for

R0 = Objective(routing_replay="R0")
TOKENS = 40  # of a micro-batch: several, cut alike by scorer and trainer
CUTS = {"micro_batch_size": None, "micro_batch_tokens": TOKENS}
EVERYTHING = [np.arange(8)]


def start_of(model: Path, samples: Sequence[Sample]) -> tuple[FloatArray, list[Sample]]:
    """log pi_0 in float32, and the samples carrying its routes."""
    spec = ScoringSpec(str(model), micro_batch_tokens=TOKENS, with_routes=True)
    scores = asyncio.run(scores_of(samples, spec, cache_dir=None, num_scorers=1, on_ray=False, deadline_s=60))
    assert scores.routes_N is not None
    carrying = [
        dataclasses.replace(s, start_routes_TLK=r) for s, r in zip(samples, scores.routes_N, strict=True)
    ]
    return scores.log_prob_N, carrying


def test_a_scorer_keeps_the_experts_each_sample_asks(
    start: Start, tiny_moe: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Those that the same model asks in the trainer; and from the cache, what was computed."""
    _, carrying = start_of(tiny_moe, samples)
    expected = start(model=tiny_moe).inside(inside.live_routes, samples)[0]
    for sample, routes_TLK in zip(carrying, expected, strict=True):
        np.testing.assert_array_equal(sample.start_routes_TLK, routes_TLK)
    spec = ScoringSpec(str(tiny_moe), micro_batch_tokens=TOKENS, with_routes=True)
    for _ in range(2):
        options: dict[str, Any] = {"num_scorers": 1, "on_ray": False, "deadline_s": 60}
        cached = asyncio.run(scores_of(samples, spec, cache_dir=tmp_path, **options))
        for sample, routes_TLK in zip(carrying, cached.routes_N or (), strict=True):
            np.testing.assert_array_equal(sample.start_routes_TLK, routes_TLK)
            assert routes_TLK.dtype == np.uint8
    assert len(list(tmp_path.iterdir())) == 1


def test_at_the_start_every_ratio_is_exactly_one(start: Start, vllm_moe: Path, samples: list[Sample]) -> None:
    log_start_N, carrying = start_of(vllm_moe, samples)
    trainer = start(model=vllm_moe, objective=R0, **CUTS)
    np.testing.assert_array_equal(trainer.score(carrying), log_start_N)


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 2), (2, 3)])
def test_and_on_other_layouts_up_to_rounding(
    start: Start, vllm_moe: Path, samples: list[Sample], world_size: int, zero_stage: int
) -> None:
    log_start_N, carrying = start_of(vllm_moe, samples)
    trainer = start(model=vllm_moe, objective=R0, world_size=world_size, zero_stage=zero_stage)
    assert np.abs(trainer.score(carrying) - log_start_N).max() < 1e-4


def test_noise_of_routers_is_kept_out_of_the_ratios(start: Start, vllm_moe: Path) -> None:
    """Routers nudged so that they choose otherwise: gates stay live, so what is left is small, not nothing."""
    log_start_N, carrying = start_of(vllm_moe, random_samples(64))
    deviation = {}
    for objective in (Objective(), R0):
        trainer = start(model=vllm_moe, objective=objective, **CUTS)
        trainer.inside(inside.nudge_routers, 0.01)
        deviation[objective.routing_replay] = float(np.std(trainer.score(carrying) - log_start_N))
    assert 0 < deviation["R0"] < deviation[None] / 2, deviation


def test_so_is_what_another_precision_makes_of_them(start: Start, vllm_moe: Path) -> None:
    """A bfloat16 trainer against a float32 start: no weight has moved, and L is noise."""
    log_start_N, carrying = start_of(vllm_moe, random_samples(64))
    deviation = {}
    for objective in (Objective(), R0):
        trainer = start(model=vllm_moe, objective=objective, dtype="bfloat16", **CUTS)
        deviation[objective.routing_replay] = float(np.std(trainer.score(carrying) - log_start_N))
    assert 0 < deviation["R0"] < deviation[None], deviation


@pytest.mark.parametrize("looks_back", [False, True])
def test_steps_are_routed_live(start: Start, tiny_moe: Path, samples: list[Sample], looks_back: bool) -> None:
    """Given others' experts to score under, scores change and the step does not, by a bit."""
    clip = RatioClip() if looks_back else None

    def train(trainer: Trainer, batch: list[Sample]) -> tuple[FloatArray, str, float]:
        async def work() -> tuple[FloatArray, Any]:
            pool = trainer.pool()
            groups = probe_groups(batch, lambda block: block)
            scored = await (pool.begin(groups, EVERYTHING) if looks_back else pool.score(groups))
            return column(scored), await pool.step(scored, plan_for(batch))

        log_policy_N, report = asyncio.run(work())
        return log_policy_N, trainer.sha256(), report.figures.get("ratio/max_abs_delta", 0.0)

    _, carrying = start_of(tiny_moe, samples)
    others = [
        dataclasses.replace(s, start_routes_TLK=np.full_like(s.start_routes_TLK, [2, 3]))
        for s in carrying
        if s.start_routes_TLK is not None
    ]
    live = train(start(model=tiny_moe, objective=Objective(clip=clip)), samples)
    own = train(start(model=tiny_moe, objective=dataclasses.replace(R0, clip=clip)), carrying)
    forced = train(start(model=tiny_moe, objective=dataclasses.replace(R0, clip=clip)), others)
    assert live[1] == own[1] == forced[1]
    assert live[2] == own[2] == forced[2] == 0  # what a step is compared with is live, as the step is
    np.testing.assert_array_equal(own[0], live[0])
    assert np.abs(forced[0] - live[0]).max() > 1e-4


def column(groups: Sequence[Group]) -> FloatArray:
    return np.concatenate([g.log_policy_N for g in groups])  # type: ignore[misc]


def test_samples_without_routes_are_refused(start: Start, tiny_moe: Path, samples: list[Sample]) -> None:
    _, carrying = start_of(tiny_moe, samples)
    carrying[4] = dataclasses.replace(carrying[4], start_routes_TLK=None, is_replay=True)
    trainer = start(model=tiny_moe, objective=R0)
    trainer.score(carrying)  # a replay row is outside of ratios
    carrying[3] = dataclasses.replace(carrying[3], start_routes_TLK=None)
    with pytest.raises(DataError, match="row 3 does not carry routes of the start"):
        trainer.score(carrying)
    assert np.isfinite(trainer.score(carrying, "score_live")).all()  # an export is checked without


# --- the pool of scorers, for samples as they come


def groups_of(samples: Sequence[Sample], put: Any) -> list[Group]:
    """Two blocks, as two rounds' groups would have."""
    return [*probe_groups(samples[:5], put), *probe_groups(samples[5:], put)]


async def check_pool(pool: ScorerPool, groups: list[Group], read: Any, model: Path) -> list[np.ndarray]:
    """Groups in their order, their handles on samples that carry what the frozen model asks."""
    scored = await pool.score(groups)
    await pool.close()
    assert [g.row_N.tolist() for g in scored] == [g.row_N.tolist() for g in groups]
    found: list[np.ndarray] = []
    alone = ReferenceModel(ScoringSpec(str(model), micro_batch_tokens=TOKENS, with_routes=True))
    for group in scored:
        block = read(group.payload.block)
        for n, (i, row) in enumerate(zip(group.payload.index_N, group.row_N, strict=True)):
            sample = block[int(i)]
            assert sample.row == row and group.log_reference_N is not None
            expected = alone.score_micro_batch([sample])
            assert expected.tokens[0].sum() == pytest.approx(group.log_reference_N[n], abs=1e-4)
            assert expected.routes is not None
            np.testing.assert_array_equal(sample.start_routes_TLK, expected.routes[0])
            found.append(sample.start_routes_TLK)
    return found


async def test_a_pool_of_scorers_hands_on_samples_with_their_routes(
    vllm_moe: Path, samples: list[Sample]
) -> None:
    spec = ScoringSpec(str(vllm_moe), micro_batch_tokens=TOKENS, with_routes=True)
    for count in (1, 3):
        workers = [LocalWorker(lambda: ReferenceModel(spec), "scorer") for _ in range(count)]
        pool = ScorerPool(workers, TOKENS, with_routes=True)
        assert len(await check_pool(pool, groups_of(samples, list), list, vllm_moe)) == len(samples)


async def test_and_on_ray_by_reference(ray_cluster: Any, vllm_moe: Path, samples: list[Sample]) -> None:
    placement = RayPlacement(Resources(scorers=2))
    spec = ScoringSpec(str(vllm_moe), micro_batch_tokens=TOKENS, with_routes=True)
    await placement.reserve(trainers=0, scorers=2)
    try:
        pool = await placement.scorers(spec, 2)
        await check_pool(pool, groups_of(samples, placement.put), ray_cluster.get, vllm_moe)
    finally:
        await placement.close()


# --- whole jobs, and what is no job


def job(model: Path, likelihood: Any, routing_replay: str | None = "R0", **more: Any) -> dict[str, Any]:
    training = {"epochs": 1, "max_steps": 3, "batch_size": 4, "learning_rate": 0.01}
    weighted = {"likelihood": likelihood, "training": training, "routing_replay": routing_replay}
    method = {"type": "weighted", "weighted": weighted}
    return {"model": str(model), "training_file": "-", "method": method, **more}


ANCHORED = {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": 0.5}


def test_a_whole_job(vllm_moe: Path, tmp_path: Path) -> None:
    """bfloat16 throughout, so that rounding changes routes: the noise L begins with is smaller with R0."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {c}", "completion": c * (2 + 3 * (j % 4))} for j, c in enumerate("abcdefghijkl")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise = {}
    for replay in (None, "R0"):
        resources = {"dtype": "bfloat16", "micro_batch_tokens": 48}
        config = parse_config(job(vllm_moe, ANCHORED, replay, resources=resources))
        out = tmp_path / str(replay)
        spec = AttemptSpec("job", 1, config, {"training_file": file}, vllm_moe, out, out / "cache")
        journal = ResultJournal(out / "results", CallbackSink(lambda event: None))
        result = asyncio.run(Attempt(spec, LocalPlacement(), journal).run())
        assert result.outcome.state.step == 3
        metrics = read_metrics(out / "results")
        noise[replay] = float(metrics.known("weights.L_std")[1][0])
        assert np.isfinite(metrics.known("loss")[1]).all()
    assert noise["R0"] <= noise[None], noise


def test_refused_without_a_ratio_to_the_start(tiny_moe: Path) -> None:
    static = {"scheme": "ratio_power", "of": "initial", "gamma": 0.5}
    for likelihood in ({"scheme": "uniform"}, static, {**ANCHORED, "of": "policy_over_data"}):
        with pytest.raises(ConfigError, match="R0 is for ratios to the start"):
            parse_config(job(tiny_moe, likelihood))
    grader = {"type": "string_check", "input": "a", "reference": "b", "operation": "eq"}
    online = {"type": "online", "online": {"preset": "grpo", "grader": grader, "routing_replay": "R0"}}
    with pytest.raises(ConfigError, match="R0 is for ratios to the start"):
        parse_config({"model": str(tiny_moe), "training_file": "-", "method": online})


def test_refused_for_a_dense_model(tiny_dense: Path) -> None:
    config = parse_config(job(tiny_dense, ANCHORED))
    with pytest.raises(ConfigError, match="MoE") as refused:
        refuse_replay_without_experts(config, ModelInfo.read(tiny_dense))
    assert refused.value.param == "method.weighted.routing_replay"
    with pytest.raises(ModelError, match="MoE"):
        ReferenceModel(ScoringSpec(str(tiny_dense), with_routes=True))
