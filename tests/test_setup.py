"""`deploy/setup.sh`, in a copy of its own, with a stand-in for Python that only pretends to install."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Just enough of a checkout for the set-up to run in."""
    copy = tmp_path / "checkout"
    (copy / "deploy" / "requirements").mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "setup.sh", copy / "deploy")
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "deploy" / "requirements" / "cpu.txt").write_text("# two\nnumpy==2.3.5\ntorch==2.13.0+cpu\n")
    return copy


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "deploy/setup.sh", "cpu"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_setup_says_which_python_it_needs(checkout: Path, tmp_path: Path) -> None:
    for name in ("python", "python3", "python3.11"):
        write_program(tmp_path / "bin" / name, "exit 1")

    done = run_setup(checkout, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON="")

    assert done.returncode == 1
    assert "needs Python 3.11" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def pretend_python(checkout: Path, pip: str) -> Path:
    """A .venv whose pip only writes down what it was asked, then does what `pip` (bash) says."""
    calls = checkout / "calls"
    write_program(
        checkout / ".venv" / "bin" / "python",
        f"""case "$*" in
        *"pip install"*) echo "$*" >>{calls}; {pip} ;;
        *) exec {sys.executable} "$@" ;;
        esac""",
    )
    return calls


def test_setup_asks_pytorch_s_own_index_for_torch_alone(checkout: Path) -> None:
    refuse = 'case "$*" in *torch==*) [[ "$*" == *download.pytorch.org* ]] || exit 1 ;; esac'
    calls = pretend_python(checkout, refuse)

    done = run_setup(checkout)

    assert done.returncode == 0, done.stderr
    asked = [line.split("--progress-bar off ")[1] for line in calls.read_text().splitlines()]
    assert asked == [
        "torch==2.13.0+cpu",
        "--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu",
        "-r deploy/requirements/cpu.txt",
        "--no-build-isolation --editable .",
    ]


def test_a_second_setup_installs_nothing_until_the_list_changes(checkout: Path) -> None:
    calls = pretend_python(checkout, "exit 0")
    assert run_setup(checkout).returncode == 0
    first = len(calls.read_text().splitlines())

    assert run_setup(checkout).returncode == 0
    assert len(calls.read_text().splitlines()) == first

    with (checkout / "deploy" / "requirements" / "cpu.txt").open("a") as file:
        file.write("scipy==1.17.1\n")
    assert run_setup(checkout).returncode == 0
    assert len(calls.read_text().splitlines()) == 2 * first


def test_setup_tries_twice_and_then_shows_the_log(checkout: Path) -> None:
    calls = pretend_python(checkout, 'case "$*" in *cpu.txt*) echo "connection reset"; exit 1 ;; esac')
    write_program(checkout / "bin" / "sleep", "exit 0")

    done = run_setup(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}")

    assert done.returncode == 1
    assert calls.read_text().count("cpu.txt") == 2
    assert "connection reset" in done.stderr
    assert ".venv/setup.log" in done.stderr
    assert list((checkout / ".venv").glob(".installed-*")) == []


def test_setup_hides_pip_s_noise_and_keeps_the_rest(checkout: Path) -> None:
    noise = "WARNING: Location '/x' is ignored: it is either a non-existing path or lacks a specific scheme."
    pretend_python(checkout, f'echo "{noise}"; echo "Collecting numpy==2.3.5"')

    done = run_setup(checkout)

    assert done.returncode == 0, done.stderr
    assert "[  1/2] numpy==2.3.5" in done.stderr
    assert "is ignored" not in done.stderr
    log = (checkout / ".venv" / "setup.log").read_text()
    assert "Collecting numpy==2.3.5" in log
    assert "is ignored" not in log
