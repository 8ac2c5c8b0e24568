"""`make bench`: what its table says, what a run that was interrupted goes on with, and what its pieces measure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.bench import online, service
from tests.bench.__main__ import ROOT, Store, measure
from tests.bench.alone import RANK_VARIABLES
from tests.bench.lines import Line, markdown, rich_table, slope
from tests.bench.pieces import PIECES, Piece
from tests.forks import environ


@pytest.mark.parametrize(
    ("ratio", "relation", "bound", "reached"),
    [
        (3.0, ">=", 3.0, True),
        (2.99, ">=", 3.0, False),
        (5.0, "<=", 5.0, True),
        (5.01, "<=", 5.0, False),
        (math.nan, ">=", 3.0, False),
        (1.0, None, None, None),
        (None, ">=", 3.0, None),
    ],
)
def test_an_aim_is_reached_or_not_or_there_is_none(
    ratio: float | None, relation: str | None, bound: float | None, reached: bool | None
) -> None:
    line = Line("piece", "what", ratio=ratio, relation=relation, bound=bound)  # type: ignore[arg-type]
    assert line.reached is reached
    assert line.cells()[-1] == {True: "reached", False: "not reached", None: ""}[reached]


def test_the_table_as_markdown_and_on_a_terminal() -> None:
    lines = [Line("a", "x | y", "1 s", "2 s", 0.5, "<=", 1.0), Line("b", "report", "7 ms")]
    text = markdown(lines, "Speed", ["One machine."])
    assert "| a | x \\| y | 1 s | 2 s | 0.5 | ≤ 1 | reached |" in text
    assert "| b | report | 7 ms |  |  |  |  |" in text
    console = Console(record=True, width=120, file=None)
    console.print(rich_table(lines, "Speed"))
    assert "reached" in console.export_text()


def test_slopes_by_hand() -> None:
    assert slope({10: 3.0, 100: 3.0, 1000: 3.0}) == pytest.approx(0.0)
    assert slope({1: 1.0, 2: 4.0, 4: 16.0}) == pytest.approx(2.0)
    assert math.isnan(slope({10: 1.0}))


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    runs: list[str] = []

    def piece(name: str, error: str | None = None) -> Piece:
        def run() -> list[Line]:
            runs.append(name)
            if error is not None:
                raise RuntimeError(error)
            return [Line(name, "speed", ratio=1.0, relation=">=", bound=0.5)]

        return Piece(name, name, 1.0, run)

    store, console = Store(tmp_path, "commit-1"), Console(quiet=True)
    lines, problems = measure([piece("a"), piece("b", "no peer"), piece("c")], store, console)
    assert [line.piece for line in lines] == ["a", "c"]  # one that fails does not stop the others
    assert problems == ["b failed: no peer"] and runs == ["a", "b", "c"]
    again, problems = measure([piece("a"), piece("b"), piece("c")], store, console)
    assert [line.piece for line in again] == ["a", "b", "c"] and not problems
    assert runs == ["a", "b", "c", "b"]
    assert again[0] == lines[0]
    measure([piece("a")], Store(tmp_path, "commit-2"), console)  # other code: measured again
    measure([piece("a")], Store(tmp_path, "commit-2"), console, fresh=True)
    assert runs == ["a", "b", "c", "b", "a", "a"]
    (tmp_path / "piece-a.json").write_text("{")
    assert Store(tmp_path, "commit-2").read("a") is None


def test_help_teaches_and_the_list_names_every_piece() -> None:
    def output(*arguments: str) -> str:
        command = [sys.executable, "-m", "tests.bench", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "--only sync rollout" in output("--help")
    assert [line.split()[0] for line in output("--list").splitlines()] == list(PIECES)
    assert sum(piece.seconds for piece in PIECES.values()) <= 20 * 60


# --- pieces


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
    found = online.summarise([online.Step(*step) for step in steps])
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

    case = online.Case()
    method = {"type": "online", "online": {"preset": "grpo", "grader": online.grader(case)}}
    config = parse_config({"model": "m", "training_file": "f", "method": method})
    lengths = [1, 96, 192]
    items = [GradeItem("x", {}, length) for length in lengths]
    ours = [grade.reward for grade in asyncio.run(build_grader(config.grader).grade(items))]
    theirs = online.trl_reward(case)(completion_ids=[[0] * n for n in lengths])
    assert ours == pytest.approx(theirs) and ours == pytest.approx([-1 / 192, -0.5, -1.0])


@pytest.mark.slow
def test_the_contenders_of_the_online_loop_write_alike(
    tmp_path: Path, forks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 0.3 M parameters: as many samples each, and lengths by the same two end tokens."""
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in RANK_VARIABLES:  # of a trainer that ran in this process
        monkeypatch.setenv(name, rank[name])
    case = online.Case(prompts=4, samples=8, max_tokens=64, rounds=1, threads=1, width=64, layers=1)
    model = online.build_model(case, tmp_path / "model")
    with environ(forks):
        found = {name: online.run_one(name, case, model) for name in ("trl", "ours_overlapped")}
    for figures in found.values():
        # Each token ends a text with a chance of about 2 in 261: 50 tokens on average, give or take 4.
        assert 30 < figures["mean_tokens"] < 64
        assert 0.3 < figures["cut_share"] < 0.9
    assert 0 < found["ours_overlapped"]["wait_share"] < 1
    assert online.speed_up(found, "ours_overlapped") > 0


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
    assert online.route_bytes(tmp_path) == 6.0


def test_submissions_and_events_are_timed_against_a_real_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MEASURED", 3)
    for found in (service.submissions([2, 6]), service.event_delays([4, 600])):
        assert sorted(len(seconds) for seconds in found.values()) == [3, 3]
        assert all(0 < s < 60 for seconds in found.values() for s in seconds)
        assert math.isfinite(service.slope(found))
    assert json.dumps(found)
