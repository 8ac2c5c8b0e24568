"""A Ray cluster of several nodes on this machine, each a `ray start` with an address, ports and a directory of its own.

On loopback every node has another address of 127.0.0.0/8, which needs no rights. With network
namespaces (root) each has an interface, a hostname's worth of its own and a cable that can be pulled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors.network import free_ports

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 90.0


@dataclass
class Node:
    """One `ray start --block` and everything under it."""

    address: str
    process: subprocess.Popen[bytes]
    scratch: str

    def family(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """As if the machine had lost its power: -9 to all of it, by pid."""
        family = self.family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()  # so that none starts another or says goodbye
        for member in [*family, *self.family()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(30)


class Nodes:
    """`with Nodes(…) as cluster:`. The first node is the head; killed nodes stay away."""

    def __init__(
        self,
        directory: Path,
        cpus: Sequence[int] = (1, 1, 1),
        *,
        prefixes: Sequence[Sequence[str]] | None = None,
        addresses: Sequence[str] = (),
        dashboard: bool = False,
        forks: Mapping[str, str] | None = None,
    ) -> None:
        """`prefixes`: what is put before each node's command, such as `ip netns exec NAME`.

        `forks`: the environment in which workers are forks (`tests/forks.py`); of nodes on loopback only, since
        a fork is in its zygote's namespace.
        """
        self._forks = forks or {}
        third = 10 + secrets.randbelow(240)  # two clusters of two test runs do not meet
        self.addresses = list(addresses) or [f"127.77.{third}.{i + 1}" for i in range(len(cpus))]
        self.prefixes = [list(prefix) for prefix in prefixes or [()] * len(cpus)]
        self._cpus = cpus
        self._dashboard = dashboard
        self._directory = directory
        self._port, self._dashboard_port = free_ports(2)
        self.nodes: list[Node] = []

    @property
    def address(self) -> str:
        return f"{self.addresses[0]}:{self._port}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.addresses[0]}:{self._dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of nodes and of drivers."""
        token = self._directory / "ray-token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        ours = {
            "RAY_enable_worker_prestart": "false",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": str(ROOT),
        }
        return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **ours, **self._forks}

    def __enter__(self) -> Nodes:
        try:
            for index in range(len(self.addresses)):
                self.nodes.append(self._start(index))
            self._await_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.kill()
            shutil.rmtree(node.scratch, ignore_errors=True)

    def start(self, index: int) -> None:
        """The node again, after it was killed."""
        self.nodes[index] = self._start(index)

    def _start(self, index: int) -> Node:
        # Sockets live under this directory and their paths may not exceed 107 characters.
        scratch = tempfile.mkdtemp(prefix="mn-")
        first = index == 0
        ports = [str(port) for port in free_ports(6)]
        command = [
            *self.prefixes[index],
            *(str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address", self.addresses[index], "--num-cpus", str(self._cpus[index])),
            *("--object-store-memory", str(128 * 2**20), "--temp-dir", scratch),
            *("--node-manager-port", ports[0], "--object-manager-port", ports[1]),
            *("--dashboard-agent-listen-port", ports[2], "--runtime-env-agent-port", ports[3]),
            *("--dashboard-agent-grpc-port", ports[4], "--metrics-export-port", ports[5]),
            # Any free port: nodes of one machine would hand out the same ones.
            *("--min-worker-port", "0", "--max-worker-port", "0"),
        ]
        if first:
            command += ["--head", "--port", str(self._port)]
            command += ["--include-dashboard", str(self._dashboard).lower()]
            command += ["--dashboard-host", self.addresses[0], "--dashboard-port", str(self._dashboard_port)]
        else:
            command += ["--address", self.address]
        log = (self._directory / f"node-{index}.log").open("ab")
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=self.environment,
        )
        if first:  # others need its port
            _until(lambda: self._is_up(process), "the head does not start", START_DEADLINE_S)
        return Node(self.addresses[index], process, scratch)

    def _is_up(self, process: subprocess.Popen[bytes]) -> bool:
        printed = (self._directory / "node-0.log").read_text()
        assert process.poll() is None, printed
        return "Ray runtime started" in printed

    def _await_nodes(self) -> None:
        """All have joined. Asked by a process of its own, which belongs to no other cluster."""
        script = (
            "import ray, sys, time\n"
            f"ray.init({self.address!r}, log_to_driver=False, configure_logging=False)\n"
            f"ends = time.monotonic() + {START_DEADLINE_S}\n"
            f"while sum(n['Alive'] for n in ray.nodes()) < {len(self.addresses)}:\n"
            "    assert time.monotonic() < ends, ray.nodes()\n"
            "    time.sleep(0.2)\n"
        )
        self.run([sys.executable, "-c", script])

    def run(
        self, command: Sequence[str], *, node: int = 0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a node, connected to this cluster; its output is in what is raised if it fails."""
        done = subprocess.run(
            [*self.prefixes[node], *command],
            env={**self.environment, "RAY_ADDRESS": self.address, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}\n{self.logs()}"
        return done

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-1500:]}" for path in self._directory.glob("node-*.log")
        )


def _until(condition: Callable[[], bool], what: str, deadline_s: float) -> None:
    ends = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.2)
