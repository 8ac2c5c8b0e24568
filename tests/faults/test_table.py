"""A cell that goes wrong is a row, and the cells after it are done all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.cells import CELLS, Cell
from tests.faults.history import Trained
from tests.faults.laboratory import Finding, Laboratory
from tests.faults.table import Table

CELL = Cell("driver.setup", "before")


def finding(cell: Cell | None, *problems: str) -> Finding:
    return Finding(cell, "offline", "ftjob-1", 9.4, 2, 1, 3.25, "ab", Trained(), problems=list(problems))


def test_rows_are_on_the_disk_as_they_are_found_and_known_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    table = Table(path)
    table.add(finding(None))
    table.add(finding(CELLS[1], "a | b\nc", "d"))
    text = path.read_text()
    assert text.endswith(f"| {CELLS[1]} | a / b c; d | 2 | 1 | 3.2 | 9 |\n")
    again = Table(path)
    assert again.kept == {"offline: none": "yes", str(CELLS[1]): "a / b c; d"}
    again.add(finding(None))
    again.add(finding(CELLS[2]))
    assert path.read_text() == text + f"| {CELLS[2]} | yes | 2 | 1 | 3.2 | 9 |\n"


def test_every_cell_has_a_name_of_its_own() -> None:
    assert len({str(cell) for cell in CELLS}) == len(CELLS)


def test_a_job_that_does_not_end_and_one_without_results_are_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory = Laboratory(tmp_path, {"offline": tmp_path})
    cleared: list[str] = []

    def never(*_: Any, **__: Any) -> Any:
        raise TimeoutError("ftjob-1 did not end\nwithin 240 s")

    monkeypatch.setattr(laboratory, "_submit", lambda *_: "ftjob-1")
    monkeypatch.setattr(laboratory, "_follow", lambda *_: None)
    monkeypatch.setattr(laboratory, "_until_ended", never)
    monkeypatch.setattr(laboratory, "_clear_away", lambda job_id: cleared.append(job_id) or [])
    found = laboratory._observe(CELL, "offline")
    assert found.problems == ["TimeoutError: ftjob-1 did not end within 240 s"] and cleared == ["ftjob-1"]
