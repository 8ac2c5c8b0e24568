"""The online loop beside TRL's: both do the same work, and what is counted of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.bench.alone import RANK_VARIABLES
from tests.bench.online import rounds
from tests.bench.online.case import Case, build_model, grader, trl_reward
from tests.bench.online.contenders import run_one
from tests.bench.online.table import speed_up
from tests.forks import environ


def test_what_an_online_round_cost_by_hand() -> None:
    """Two counted rounds of 4 samples in 10 s, of which the trainer worked 4."""

    def data(total: float, sync: float) -> dict[str, float]:
        parts = {"drain": 0.0, "gather": 0.1, "load": 0.2, "verify": 0.3}
        return {
            "rollout.tokens": 40.0,
            "rollout.written": 4.0,
            "rollout.cut_share": 0.25,
            "seconds_total": total,
            "sync.seconds": sync,
            "sync.bytes": 1e6,
            **{f"sync.{part}_seconds": value for part, value in parts.items()},
        }

    first = {k: v for k, v in data(9.0, 9.0).items() if not k.startswith("sync")}
    steps = [(100.0, 0.0, first), (104.0, 5.0, data(1.0, 0.5)), (110.0, 16.0, data(3.0, 0.7))]
    found = rounds.summarise([rounds.Step(*step) for step in steps])
    assert found["samples_per_cpu_second"] == pytest.approx(0.5)
    assert found["samples_per_second"] == pytest.approx(0.8)
    assert found["tokens_per_second"] == pytest.approx(8.0)
    assert found["mean_tokens"] == 10.0 and found["cut_share"] == 0.25
    assert found["wait_share"] == pytest.approx(0.6)
    assert found["sync_seconds"] == 0.5  # the fastest
    assert found["copy_seconds"] > 0


def test_both_sides_give_the_same_rewards() -> None:
    import asyncio

    from modeseek_ray.config import parse_config
    from modeseek_ray.rewards import GradeItem, build_grader

    case = Case()
    method = {"type": "online", "online": {"preset": "grpo", "grader": grader(case)}}
    config = parse_config({"model": "m", "training_file": "f", "method": method})
    lengths = [1, 96, 192]
    items = [GradeItem("x", {}, length) for length in lengths]
    ours = [grade.reward for grade in asyncio.run(build_grader(config.grader).grade(items))]
    theirs = trl_reward(case)(completion_ids=[[0] * n for n in lengths])
    assert ours == pytest.approx(theirs) and ours == pytest.approx([-1 / 192, -0.5, -1.0])


@pytest.mark.slow
def test_the_contenders_of_the_online_loop_write_alike(
    tmp_path: Path, forks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 0.3 M parameters: as many samples each, and lengths by the same two end tokens."""
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in RANK_VARIABLES:  # of a trainer that ran in this process
        monkeypatch.setenv(name, rank[name])
    case = Case(prompts=4, samples=8, max_tokens=64, rounds=1, threads=1, width=64, layers=1)
    model = build_model(case, tmp_path / "model")
    with environ(forks):
        found = {name: run_one(name, case, model) for name in ("trl", "ours_overlapped")}
    for figures in found.values():
        # Each token ends a text with a chance of about 2 in 261: 50 tokens on average, give or take 4.
        assert 30 < figures["mean_tokens"] < 64
        assert 0.3 < figures["cut_share"] < 0.9
    assert 0 < found["ours_overlapped"]["wait_share"] < 1
    assert speed_up(found, "ours_overlapped") > 0


def test_route_bytes_are_those_on_the_wire(tmp_path: Path) -> None:
    from actors.rollouts import Rollout, RolloutStore
    from modeseek_ray.rewards import Grade
    from modeseek_ray.types import Completion, Prompt

    routes_TLK = np.zeros((5, 3, 2), dtype=np.uint8)
    completion = Completion(
        np.zeros(4, np.int32),
        np.zeros(4, np.float32),
        "stop",
        weight_version=0,
        seed=0,
        routes_TLK=routes_TLK,
    )
    rollout = Rollout(Prompt(0, np.zeros(2, np.int32)), 0, completion, "", Grade(1.0, None))
    RolloutStore(tmp_path).write(0, [rollout])
    assert rounds.route_bytes(tmp_path) == 6.0
