"""Some cells of the fault matrix, a victim and an action each; all of them with `make faults`."""

from __future__ import annotations

import importlib.util
import itertools
import operator
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cells import CELLS, OFFLINE, Cell, columns, pairwise
from tests.faults.laboratory import Laboratory
from tests.forks import HOOKS, ROOT, environ

# Online jobs wait for vLLM, which the zygote cannot fork: those are left to `make faults`.
IN_TESTS = pairwise(OFFLINE)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, tiny_dense: Path) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("faults"), {"offline": tiny_dense}) as laboratory:
        yield laboratory


@pytest.mark.slow
@pytest.mark.parametrize("cell", IN_TESTS, ids=str)
def test_a_fault_changes_neither_weights_nor_history(laboratory: Laboratory, cell: Cell) -> None:
    assert laboratory.calm(cell.kind).problems == []
    assert laboratory.run(cell).problems == []


def test_no_answered_job_is_lost_or_doubled_or_changed_after_its_end(laboratory: Laboratory) -> None:
    """After all the cells above, on their one store."""
    assert laboratory.final_problems() == []


def test_a_pairwise_selection_meets_every_pair_that_there_is() -> None:
    selected = pairwise(CELLS)
    assert 20 <= len(IN_TESTS) <= 27 and 20 <= len(selected) < len(CELLS) == len(set(CELLS))
    for first, second in itertools.combinations(range(4), 2):
        met = {(columns(cell)[first], columns(cell)[second]) for cell in selected}
        assert met == {(columns(cell)[first], columns(cell)[second]) for cell in CELLS}


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
        with environ({"PYTHONPATH": f"{HOOKS}:{ROOT}", "MODESEEK_FAULT_PLAN": str(plan)}):
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
