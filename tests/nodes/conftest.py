"""Clusters with a cable that can be pulled want root and minutes: `make test-nodes` runs those tests."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

WANTED = os.environ.get("MODESEEK_NODE_TESTS") == "required"
ABLE = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("unshare") is not None

if WANTED and not ABLE:
    raise pytest.UsageError("nodes with addresses of their own need root, and the programs ip and unshare")
collect_ignore_glob = [] if WANTED else ["test_node_loss.py", "test_whole_jobs.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not WANTED:
        terminalreporter.write_line(
            "NOT RUN here: nodes killed and cut off, whole jobs over several; `make test-nodes` does.",
            yellow=True,
        )
