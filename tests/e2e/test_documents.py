"""Commands of the README, the user's guide and the operator's page, typed as a reader would, against a real service.

Blocks marked ```sh run are run by bash, in order; blocks with `file=NAME` are written first. Those marked
`run trained` want a cluster: `make test-documents` runs them too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.network import free_port
from modeseek_ray.client import Client

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "modeseek_ray" / "GUIDE.md", ROOT / "deploy" / "OPERATING.md"]
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else its first line says, its text."""

    language: str
    mark: str
    text: str


def blocks(path: Path) -> list[Block]:
    return [Block(m[1], m[2].strip(), m[3]) for m in _FENCE.finditer(path.read_text(encoding="utf-8"))]


def test_no_command_of_these_pages_is_left_out() -> None:
    for path in DOCUMENTS:
        shells = [block for block in blocks(path) if block.language in ("sh", "bash", "shell", "console")]
        assert shells and all(block.mark in ("run", "run trained") for block in shells), path


def run_blocks(
    path: Path, home: Path, url: str, directory: Path, forks: Mapping[str, str], *, trained: bool
) -> None:
    """Write the files of a page and run its commands, with `trained` those too that want a cluster.

    `forks`: in which environment commands need not import their packages.
    """
    (directory / "deploy").symlink_to(ROOT / "deploy")  # the commands are typed in the repository
    environment = {
        **os.environ,
        "PATH": f"{_modeseek(directory)}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        **forks,
        "MODESEEK_HOME": str(home),
        "MODESEEK_URL": url,
        "COLUMNS": "160",
    }
    for block in blocks(path):
        if block.mark.startswith("file="):
            (directory / block.mark.removeprefix("file=")).write_text(block.text)
        if block.mark == "run" or (trained and block.mark == "run trained"):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=directory, env=environment, capture_output=True, text=True, timeout=240, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, playground_moe: Path, forks: dict[str, str]
) -> Iterator[tuple[str, Path]]:
    """A service without a cluster: it answers and checks, and its jobs stay queued."""
    home = tmp_path_factory.mktemp("home")
    (home / "playground").symlink_to(playground_moe.parent)
    port = free_port()
    command = [sys.executable, "-m", "modeseek_ray.service", "--home", str(home), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **forks})
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 120
            while not client.is_ready():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", home
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_works_that_wants_no_cluster(
    path: Path, api: tuple[str, Path], tmp_path: Path, forks: dict[str, str]
) -> None:
    url, home = api
    run_blocks(path, home, url, tmp_path, forks, trained=False)
    if path.stem == "OPERATING":
        assert (tmp_path / "restored" / "store.sqlite3").stat().st_size > 10_000


def test_links_of_these_pages_lead_somewhere() -> None:
    for path in DOCUMENTS:
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
        assert links and [link for link in links if not (path.parent / link).exists()] == []


def _modeseek(directory: Path) -> Path:
    """The command as this checkout has it, wherever the environment's own one leads."""
    bin_ = directory / "bin"
    bin_.mkdir()
    script = bin_ / "modeseek"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m actors.main "$@"\n')
    script.chmod(0o755)
    return bin_
