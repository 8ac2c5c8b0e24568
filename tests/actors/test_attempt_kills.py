"""A whole online job over Ray whose workers are killed in mid-work, by SIGKILL of their processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from actors.answers import Answerer
from actors.attempt_online import OnlineAttempt
from actors.attempt_spec import AttemptSpec
from actors.cluster import RayPlacement
from actors.generator import seed_of
from actors.journal import CallbackSink, ResultJournal
from actors.scorers import ScorerPool
from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.reports.results import read_metrics

# A round holds more requests than an engine takes in at once, so that it comes back with some of them first.
ROUNDS, PROMPTS, SAMPLES = 3, 64, 8
DIES_IN = 1


def config_of(model: Path, prompts: Path) -> JobConfig:
    """Every kind of worker that may die without ending the attempt; R0, so that scorers hand on routes, too."""
    online = {
        "reward": {"scheme": "exponential", "beta": 0.5, "scope": "group"},
        "likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": 0.3},
        "grader": {
            "type": "string_check",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.reference }}",
            "operation": "ilike",
        },
        "rollout": {
            "samples_per_prompt": SAMPLES,
            "prompts_per_round": PROMPTS,
            "max_tokens": 24,
            "ties": "keep",
        },
        "routing_replay": "R0",
        "training": {"max_steps": ROUNDS, "learning_rate": 1e-3, "checkpoint_every": ROUNDS},
    }
    return parse_config(
        {
            "model": str(model),
            "training_file": str(prompts),
            "method": {"type": "online", "online": online},
            "resources": {"kv_cache_gib": 0.1, "micro_batch_tokens": 4096},
        }
    )


def worker(kind: str) -> psutil.Process:
    """The process of an actor of this test's own Ray, not of another run on the machine."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or []).startswith(f"ray::{kind}")
        and os.getpid() in {parent.pid for parent in process.parents()}
    ]
    assert len(found) == 1, f"{len(found)} processes of {kind}"
    return found[0]


@pytest.mark.slow
def test_an_engine_and_a_scorer_killed_in_mid_job_cost_it_nothing(
    ray_cluster: Any, vllm_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job goes on by itself; no sample lost or doubled, none by other weights than it says."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"word {i}"}], "reference": "aeiou"[i % 5]}
        for i in range(ROUNDS * PROMPTS)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    killed: dict[str, int] = {}
    answer, score = Answerer.answer, ScorerPool.score

    async def answer_while_the_engine_dies(self: Answerer, prompts: Any, round_: int) -> Any:
        if round_ != DIES_IN:
            return await answer(self, prompts, round_)
        pool: Any = self._generator
        before, victim = pool.num_written, worker("GeneratorEngine")
        work = asyncio.create_task(answer(self, prompts, round_))
        while pool.num_written == before:
            await asyncio.sleep(0.005)
        victim.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.5)  # answers that were on their way have come
        killed["written"] = pool.num_written - before
        assert not work.done()
        victim.send_signal(signal.SIGKILL)
        return await work

    async def score_while_the_scorer_dies(self: ScorerPool, groups: Any) -> Any:
        if "written" in killed and "scorer" not in killed:
            victim = worker("ReferenceModel")
            victim.send_signal(signal.SIGSTOP)  # what it is asked now it will never answer
            work = asyncio.create_task(score(self, groups))
            await asyncio.sleep(0.5)
            assert not work.done()
            killed["scorer"] = victim.pid
            victim.send_signal(signal.SIGKILL)
            return await work
        return await score(self, groups)

    monkeypatch.setattr(Answerer, "answer", answer_while_the_engine_dies)
    monkeypatch.setattr(ScorerPool, "score", score_while_the_scorer_dies)
    config = config_of(vllm_moe, prompts)
    events: list[Mapping[str, Any]] = []
    spec = AttemptSpec(
        "kills", 1, config, {"training_file": prompts}, vllm_moe, tmp_path / "job", tmp_path / "cache"
    )
    journal = ResultJournal(tmp_path / "job" / "results", CallbackSink(events.append))
    result = asyncio.run(OnlineAttempt(spec, RayPlacement(config.resources), journal).run())

    assert result.outcome.ended == "run" and result.outcome.state.step == ROUNDS
    assert 0 < killed["written"] < PROMPTS * SAMPLES and killed["scorer"]
    metrics = read_metrics(tmp_path / "job" / "results")
    assert metrics.known("rollout.samples")[1].tolist() == [PROMPTS * SAMPLES] * ROUNDS
    assert metrics.known("rollout.staleness")[1].tolist() == [0.0] * ROUNDS
    assert (
        metrics.known("sync.largest_difference_nats")[1].max() < 1e-4
    )  # the new engine has the weights, too
    assert np.isfinite(metrics.known("loss")[1]).all()
    for round_ in range(ROUNDS):
        table = pq.read_table(tmp_path / "job" / "rollouts" / f"round-{round_:06d}.parquet")
        asked = list(zip(table["prompt"].to_pylist(), table["sample"].to_pylist(), strict=True))
        assert len(set(asked)) == len(asked) == PROMPTS * SAMPLES  # none lost, none doubled
        assert set(table["weight_version"].to_pylist()) == {round_}
        expected = [seed_of(config.seed, prompt, round_, sample) for prompt, sample in asked]
        assert table["seed"].to_pylist() == expected
