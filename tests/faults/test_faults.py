"""One cell of the fault matrix; all of them with `python -m tests.faults`."""

from __future__ import annotations

import importlib.util
import operator
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.matrix import CELLS, HOOKS, IN_TESTS, Cell, Laboratory, hooked


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_leaves_the_same_weights_and_a_whole_history(tmp_path: Path, tiny_dense: Path) -> None:
    (tmp_path / "home").mkdir()
    with Laboratory(tmp_path, tiny_dense) as laboratory:
        calm = laboratory.run(None)
        assert calm.problems == []
        for cell in IN_TESTS:
            finding = laboratory.run(cell, calm.weights_sha256)
            assert (finding.problems, finding.attempts) == ([], 2), cell


KILLED_ONCE = """
import sys
from pathlib import Path
from actors.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
for step in (1, 2, 3):
    store.finish(store.begin(step, 1), {"step": step})
    print(step, flush=True)
"""


def test_a_kill_point_is_met_at_the_call_that_was_named_and_once(tmp_path: Path) -> None:
    """The rename of the second checkpoint has happened, what comes after it has not; a second run meets no fault."""
    plan = tmp_path / "plan.json"
    plan.write_text(Cell("driver.finish", "after", 2).plan())

    def run() -> tuple[int, list[str]]:
        with hooked(plan):
            command = [sys.executable, "-c", KILLED_ONCE, str(tmp_path / "checkpoints")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.split()

    assert run() == (-signal.SIGKILL, ["1"])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-1.a1", "step-2.a1"}
    assert run() == (0, ["1", "2", "3"])


def test_every_point_names_a_function_that_is_there() -> None:
    spec = importlib.util.spec_from_file_location("hooks", HOOKS / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for place in hooks.POINTS.values():
        module, _, path = place.partition(":")
        assert callable(operator.attrgetter(path)(importlib.import_module(module))), place
    assert {cell.point for cell in CELLS} == set(hooks.POINTS)
