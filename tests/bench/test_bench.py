"""`make bench`: what its table says, what a run that was interrupted goes on with, and what its pieces measure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench import rollout, service
from tests.bench.__main__ import ROOT, Store, measure
from tests.bench.lines import Line, markdown, rich_table, slope
from tests.bench.pieces import PIECES, Piece


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


def test_submissions_and_events_are_timed_against_a_real_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MEASURED", 3)
    for found in (service.submissions([2, 6]), service.event_delays([4, 600])):
        assert sorted(len(seconds) for seconds in found.values()) == [3, 3]
        assert all(0 < s < 60 for seconds in found.values() for s in seconds)
        assert math.isfinite(service.slope(found))
    assert json.dumps(found)


def test_contenders_that_take_turns_never_measure_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each asks for its turn five times; what one writes is whole, and they alternate."""
    monkeypatch.setenv(rollout.TURN, str(tmp_path / "turn"))
    script = f"""
import asyncio, os, sys, time
from tests.bench.rollout import Case, timed
async def write():
    with open({str(tmp_path / "log")!r}, "a") as log:
        for word in ("begins", "ends"):
            print(sys.argv[1], word, file=log, flush=True)
            sum(range(2_000_000))  # processor time is counted in hundredths of a second
    return 1
asyncio.run(timed(Case(moe=False, repeats=4), write, os.getpid()))
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, name], cwd=ROOT) for name in "ab"]
    assert [process.wait(120) for process in processes] == [0, 0]
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    turns = [first.split()[0] for first in lines[::2]]
    assert lines == [f"{name} {word}" for name in turns for word in ("begins", "ends")]
    assert sorted(turns) == ["a"] * 5 + ["b"] * 5


def test_contenders_are_told_of_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}

    def run(name: str, _case: object, _model: Path, variables: dict[str, str]) -> dict[str, float]:
        told[name] = variables[rollout.TURN]
        return {"of": float(ord(name))}

    monkeypatch.setattr(rollout, "run", run)
    found = rollout.run_in_turns(["b", "a"], rollout.Case(moe=False), Path())
    assert found == {"b": {"of": 98.0}, "a": {"of": 97.0}} and len(set(told.values())) == 1
