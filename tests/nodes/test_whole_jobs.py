"""With scorers, and the export loaded again: minutes."""

from __future__ import annotations

from pathlib import Path

from tests.nodes.compared import compare


def test_whole_jobs_on_two_nodes_are_those_on_one(tiny_moe: Path, tmp_path: Path) -> None:
    compare(tiny_moe, tmp_path, "--whole")
