"""Processes by `fork` instead of by import: `hooks/zygote.py`, and the variables that lead processes to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
HOOKS = Path(__file__).parent / "hooks"


@contextmanager
def zygote(*options: str) -> Iterator[dict[str, str]]:
    """What others are forks of, ready. Gives the environment in which Ray's workers and `modeseek` commands are.

    `--engines`: it has imported vLLM, too. Kill points come along if the environment names them now.
    """
    directory = Path(tempfile.mkdtemp(prefix="mz-"))  # a socket's path may not exceed 107 characters
    command = [sys.executable, str(HOOKS / "zygote.py"), str(directory / "socket"), *options]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT)]),
        "MODESEEK_TEST_ZYGOTE": str(directory / "socket"),
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": environment["PYTHONPATH"]},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield environment
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(directory)


def family(pid: int, environment: Mapping[str, str]) -> list[psutil.Process]:
    """All that a process has started, and they; a fork of `environment`'s is a child of its stand-in."""
    found: list[psutil.Process] = []
    parents = [psutil.Process(pid)]
    while parents:
        parent = parents.pop()
        with suppress(psutil.NoSuchProcess):
            parents += (children := parent.children())
            found += children
        with suppress(psutil.NoSuchProcess, OSError, KeyError, ValueError):
            fork = psutil.Process(
                int(Path(f"{environment['MODESEEK_TEST_ZYGOTE']}.{parent.pid}").read_text())
            )
            parents.append(fork)
            found.append(fork)
    return found


@contextmanager
def environ(changes: Mapping[str, str]) -> Iterator[None]:
    """These variables for processes that are started within the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
