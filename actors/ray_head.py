"""Ray's head as a process of its own: started once, adopted after a restart of the service, ended by us.

A cluster started by `ray.init()` dies with the process that called it, so `modeseek serve` starts
`ray start --head --block` in a session of its own and writes down its pid. Never `ray stop`, which
ends every Ray of the machine. Ray cannot be bound to loopback alone: token authentication is what
protects it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from actors.network import free_ports
from modeseek_ray.errors import WorkerError

START_DEADLINE_S = 120.0
END_S = 10.0  # for all its processes, before they are killed
# Not Ray's own choice, 10,002 to 19,999, which another Ray on this machine may use.
FIRST_WORKER_PORT, LAST_WORKER_PORT = 20_000, 29_999


@dataclass(frozen=True)
class RayHead:
    """A running head: where to reach it, and the process to end."""

    pid: int
    started_at: float  # of the process: a recycled pid is not ours
    address: str  # host:port for ray.init
    dashboard: str  # http://host:port for the Ray Jobs API
    agent_port: int  # of the part that starts the drivers
    scratch: str  # Ray's sockets and logs; removed with it

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started_at) < 1.0 and process.status() != "zombie"
        except psutil.NoSuchProcess:
            return False


def token_environment(directory: Path) -> dict[str, str]:
    """The environment with which head, drivers and clients know each other."""
    token = directory / "token"
    if not token.exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def start_or_adopt(directory: Path, *, num_cpus: int, gpus: int | None = None) -> tuple[RayHead, bool]:
    """The head recorded in `directory` if it still lives, else a new one. Second value: adopted.

    Raises `WorkerError` when it does not come up; its log is `directory/head.log`.
    """
    record = directory / "head.json"
    os.environ.update(token_environment(directory))
    if record.exists():
        head = RayHead(**json.loads(record.read_text()))
        if head.alive() and _answers(head, directory):
            return head, True
        stop(head)
    head = _start(directory, num_cpus, gpus)
    record.write_text(json.dumps(asdict(head)))
    return head, False


def stop(head: RayHead) -> None:
    """End the head and everything under it: a polite signal, then the whole process group."""
    if head.alive():
        _end_family(head)
    _end_orphans(head)
    shutil.rmtree(head.scratch, ignore_errors=True)


def _end_family(head: RayHead) -> None:
    process = psutil.Process(head.pid)
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    psutil.wait_procs(family, timeout=END_S)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=5)


def _end_orphans(head: RayHead) -> None:
    """What a head that was killed has left: processes of its session that are no older than it."""
    for process in psutil.process_iter(["create_time"]):
        try:
            if os.getsid(process.pid) == head.pid and process.info["create_time"] >= head.started_at - 1.0:
                process.kill()
        except (ProcessLookupError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _start(directory: Path, num_cpus: int, gpus: int | None) -> RayHead:
    # Every port is ours: another Ray on this machine holds the default ones, and an agent that cannot
    # have its port leaves a head that takes jobs and starts none.
    port, dashboard_port, agent_port, agent_grpc_port, metrics_port = free_ports(5)
    # Sockets live under this directory and their paths may not exceed 107 characters.
    scratch = tempfile.mkdtemp(prefix="mr-")
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", str(port)),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)),
        *(
            "--dashboard-agent-listen-port",
            str(agent_port),
            "--dashboard-agent-grpc-port",
            str(agent_grpc_port),
        ),
        *("--metrics-export-port", str(metrics_port)),
        *("--include-dashboard", "true", "--num-cpus", str(num_cpus), "--temp-dir", scratch),
        *("--min-worker-port", str(FIRST_WORKER_PORT), "--max-worker-port", str(LAST_WORKER_PORT)),
        *(("--num-gpus", str(gpus)) if gpus is not None else ()),
    ]
    log = (directory / "head.log").open("ab")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={
            **os.environ,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # A head that is told to end would wait half a minute for actors; jobs go on from their checkpoints.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
    head = RayHead(
        pid=process.pid,
        started_at=psutil.Process(process.pid).create_time(),
        address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        agent_port=agent_port,
        scratch=scratch,
    )
    _await(head, directory, process)
    return head


def _await(head: RayHead, directory: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if _answers(head, directory):
            return
        time.sleep(0.3)
    stop(head)
    raise WorkerError(
        "Ray's head did not start.",
        mend=f"See {directory / 'head.log'}; `modeseek doctor` checks ports, disk and memory.",
        code="ray_head",
    )


def _answers(head: RayHead, directory: Path) -> bool:
    """Whether the Jobs API answers, and the agent that starts what it is given."""
    token = (directory / "token").read_text().strip()
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        socket.create_connection(("127.0.0.1", head.agent_port), timeout=5).close()
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
