"""One real service for all end-to-end tests: `modeseek serve` in a process of its own, Ray under it.

Its processes are forks of one that has imported their packages (`tests/forks.py`); those of `test_serve.py`
and of `make demo` import everything anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.forks import family

START_DEADLINE_S = 120
# Engines end soon after a test, and a question waits for its engine however slow the machine is.
INFERENCE = {"MODESEEK_INFERENCE_IDLE_S": "8", "MODESEEK_INFERENCE_WAIT_S": "300"}


@dataclass(frozen=True)
class Service:
    """A running service: where it is, where its state lies, and its process."""

    url: str
    home: Path
    pid: int
    root: Path  # models may be named by path under it
    environment: Mapping[str, str]

    def family(self) -> list[psutil.Process]:
        """Everything that runs because of it, Ray's head (its own session) included."""
        return family(self.pid, self.environment)


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, playground_moe: Path, forks: dict[str, str]
) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("home")
    with RunningService(home, root=playground_moe.parents[1], environment=forks) as running:
        yield running


class RunningService:
    """`with RunningService(home, root=…) as service:`; interrupted (Ctrl-C) at the end."""

    def __init__(
        self,
        home: Path,
        *,
        root: Path,
        port: int | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """A `port` of its own is kept when it is started again: drivers report to it."""
        self._options = options
        self._environment = environment or {}
        self._home = home
        self._port = port
        self._root = root
        self._own = home / "models"
        self._own.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        from actors.network import free_port

        port = self._port or free_port()
        log = (self._home / "serve.log").open("ab")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "actors.main", "serve", "--port", str(port)),
                *("--home", str(self._home), "--root", str(self._root), "--root", str(self._own)),
                *self._options,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=INFERENCE
            | {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")}
            | dict(self._environment),
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self._home / "serve.log").read_text()
            try:
                urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
                return Service(url, self._home, self.process.pid, self._own, self._environment)
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise AssertionError((self._home / "serve.log").read_text())

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
