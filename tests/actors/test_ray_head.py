"""Ray's head as a process of its own: beside another Ray, adopted, ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors import ray_head


@pytest.mark.slow
def test_a_head_beside_another_ray_runs_jobs_is_adopted_and_ends(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other Ray (of the tests) holds the default ports."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    head, adopted = ray_head.start_or_adopt(tmp_path, num_cpus=2)
    try:
        assert not adopted
        assert ray_head.start_or_adopt(tmp_path, num_cpus=2) == (head, True)
        # A client of its own process: Ray reads its token once, and here it is the other cluster's.
        command = [Path(sys.executable).parent / "ray", "job", "submit", "--address", head.dashboard]
        environment = {**os.environ, **ray_head.token_environment(tmp_path)}
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            [*command, "--", "echo", "hello from a driver"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "hello from a driver" in done.stdout
    finally:
        ray_head.stop(head)
    assert not head.alive()
    assert not Path(head.scratch).exists()
    assert "Draining" not in (tmp_path / "head.log").read_text()  # or Ctrl-C would take half a minute
