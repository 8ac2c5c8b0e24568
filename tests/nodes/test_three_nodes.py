"""A job on a cluster of three nodes with addresses of their own; the rest is behind `make test-nodes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes.compared import compare


@pytest.mark.slow
def test_two_ranks_on_two_nodes_compute_what_they_compute_on_one(
    tiny_dense: Path, tmp_path: Path, forks: dict[str, str]
) -> None:
    compare(tiny_dense, tmp_path, forks=forks)
