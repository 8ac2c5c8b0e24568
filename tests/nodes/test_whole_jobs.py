"""With scorers, and the export loaded again: minutes."""

from __future__ import annotations

from pathlib import Path

from tests.nodes.compared import compare


def test_whole_jobs_on_two_nodes_are_those_on_one(tiny_moe: Path, tmp_path: Path) -> None:
    found = compare(tiny_moe, tmp_path, "--whole")
    # Whatever the placement of those who talk to each other; the second job has its scores from the cache.
    assert len(set(found["pack"]["scorers"])) == 2 and not found["spread"]["scorers"]
