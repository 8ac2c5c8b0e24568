"""A head, two workers and a service, each with an address of its own: network namespaces on one bridge.

The service and the nodes see one storage directory. The head does not see the directory in which the
service registers data files, as if that were a disk of the service's machine.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from actors.network import free_port
from tests.nodes.cluster import ROOT, Nodes

START_DEADLINE_S = 120
# A node that says nothing is given up after seconds, not after more than a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Network:
    """A bridge with the service's address, and namespaces with a cable to it."""

    def __init__(self, count: int) -> None:
        self._mark = secrets.token_hex(2)
        self._third = 10 + secrets.randbelow(240)
        self._bridge = f"mb{self._mark}"
        self.own = f"10.213.{self._third}.254"
        self.addresses = [f"10.213.{self._third}.{i + 1}" for i in range(count)]

    def __enter__(self) -> Network:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.own}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for i, address in enumerate(self.addresses):
            space, cable = self.space(i), self.cable(i)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._bridge, "up")
            for command in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                _ip("-n", space, *command)
            _ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for i in range(len(self.addresses)):
            subprocess.run(["ip", "netns", "del", self.space(i)], check=False)
            subprocess.run(["ip", "link", "del", self.cable(i)], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self._bridge], check=False)

    def space(self, index: int) -> str:
        return f"mn{self._mark}-{index}"

    def cable(self, index: int) -> str:
        return f"mc{self._mark}-{index}"

    def cut_off(self, index: int) -> None:
        _ip("link", "set", self.cable(index), "down")

    def connect(self, index: int) -> None:
        _ip("link", "set", self.cable(index), "up")


class Laboratory:
    """`with Laboratory(directory, root) as lab:`. Worker nodes are 1 and 2; `lab.network.cut_off(2)`."""

    def __init__(self, directory: Path, root: Path) -> None:
        self._directory = directory
        self._root = root  # models may be named by path under it
        self.home, self.storage, self.private = (directory / name for name in ("home", "storage", "private"))
        for path in (self.home, self.storage, self.private):
            path.mkdir()

    def __enter__(self) -> Laboratory:
        os.environ.update(IMPATIENT)
        with ExitStack() as stack:
            for name in IMPATIENT:
                stack.callback(os.environ.pop, name)
            self.network = stack.enter_context(Network(3))
            prefixes: list[list[str]] = [
                [*self.inside(0), *blind_to(self.private)],
                self.inside(1),
                self.inside(2),
            ]
            self.cluster = stack.enter_context(
                Nodes(
                    self._directory,
                    cpus=(0, 2, 2),
                    prefixes=prefixes,
                    addresses=self.network.addresses,
                    dashboard=True,
                )
            )
            stack.callback(self._stop)
            self._serve()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def inside(self, index: int) -> list[str]:
        return ["ip", "netns", "exec", self.network.space(index)]

    def replace(self, index: int, *more: str) -> None:
        """A node that is gone, started anew; `more` stands before its command."""
        self.cluster.prefixes[index] = [*self.inside(index), *more]
        self.cluster.start(index)
        self.until(lambda: self.alive() == 3, 60)

    def alive(self) -> int:
        """Nodes that the head believes to live."""
        token = Path(self.cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        answer = httpx.get(
            f"{self.cluster.dashboard}/nodes?view=summary",
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
            timeout=30,
        )
        nodes = answer.json()["data"]["summary"]
        return sum((node.get("raylet") or {}).get("state") == "ALIVE" for node in nodes)

    # --- the service

    def _serve(self) -> None:
        environment = {**self.cluster.environment, "MODESEEK_STORAGE": str(self.storage)}
        command = [sys.executable, "-m", "actors.main"]
        made = subprocess.run(
            [*command, "keys", "create", "me", "--home", str(self.home)],
            env=environment, cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        self.key = next(word for word in made.stdout.split() if word.startswith("msk_"))
        self.url = f"http://{self.network.own}:{free_port()}"
        log = (self._directory / "serve.log").open("ab")
        self.process = subprocess.Popen(
            [
                *(*command, "serve", "--home", str(self.home), "--host", self.network.own),
                *("--port", self.url.rpartition(":")[2], "--ray-address", self.cluster.dashboard),
                *("--root", str(self._root), "--root", str(self.private)),
            ],
            env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, trust_env=False, timeout=30
        )
        self.until(self._answers, START_DEADLINE_S)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self._directory / "serve.log").read_text()
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def submit(self, model: Path, data: str, training: dict[str, Any]) -> str:
        """A weighted ZeRO-2 job of two ranks, spread; `data` is a file id."""
        likelihood = {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": {"ess": {"floor": 0.5}}}
        body = {
            "model": str(model),
            "training_file": data,
            "method": {"type": "weighted", "weighted": {"likelihood": likelihood, "training": training}},
            "resources": {"trainers": 2, "zero_stage": 2, "scorers": 2, "placement": "spread"},
        }
        answer = self.http.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        return answer

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """Oldest first."""
        page = self.http.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()
        found = list(page["data"])
        while page["has_more"]:
            after = page["data"][-1]["id"]
            page = self.http.get(
                f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100, "after": after}
            ).json()
            found += page["data"]
        return found[::-1]

    def until(
        self, condition: Callable[[], bool], deadline_s: float = 240, job_id: str | None = None
    ) -> None:
        ends = time.monotonic() + deadline_s
        while not condition():
            if job_id is not None:
                job = self.job(job_id)
                assert job["status"] not in ("failed", "cancelled"), job["error"]
            assert time.monotonic() < ends, self.explain(job_id)
            time.sleep(0.1)

    def explain(self, job_id: str | None) -> str:
        parts = [(self._directory / "serve.log").read_text()[-3000:]]
        if job_id is not None:
            parts += [event["message"] for event in self.events(job_id)][-20:]
            parts.append(self.http.get(f"/v1/fine_tuning/jobs/{job_id}/logs").text[-4000:])
        return "\n".join([*parts, self.cluster.logs()])

    def weights_sha256(self, job_id: str) -> str:
        return str(
            json.loads((self.storage / "jobs" / job_id / "results" / "job.json").read_text())[
                "weights_sha256"
            ]
        )


def blind_to(directory: Path) -> list[str]:
    """Before a command: it and its children see an empty directory of their own there."""
    script = f'mount -t tmpfs none "{directory}" && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
