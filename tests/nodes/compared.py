"""The same job packed and spread over a cluster of three nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.cluster import Nodes


def compare(
    model: Path, directory: Path, *options: str, forks: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What was found; that both are the same is seen here."""
    with Nodes(directory, cpus=(2, 1, 1), forks=forks) as cluster:
        command = [sys.executable, "-m", "tests.nodes.loss_curves", str(model), str(directory), *options]
        found = json.loads(cluster.run(command).stdout.splitlines()[-1])
    assert len(set(found["pack"]["nodes"])) == 1
    assert len(set(found["spread"]["nodes"])) == 2
    assert set(found["spread"]["nodes"]) <= set(cluster.addresses)
    assert len(found["spread"]["losses"]) == 4
    assert found["spread"]["losses"] == pytest.approx(found["pack"]["losses"], rel=1e-5)
    # Stronger: the layout is the same, and so is every bit.
    assert found["spread"]["sha256"] == found["pack"]["sha256"]
    return dict(found)
