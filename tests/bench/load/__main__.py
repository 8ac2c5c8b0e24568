"""`python -m tests.bench.load [--seconds 60]`: the service under 464 clients on loopback, and what it answers.

64 submitters of which 30 % repeat themselves, 200 pollers, 200 listeners to event streams, and 20
drivers that write two events a second each. All clients are one process and the service another, so on
two cores both have one: the processor time of each says whose the latencies are. Memory is the service's
resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from actors.network import free_port
from tests.bench.load.clients import Load, Seen, problems


@dataclass(frozen=True)
class Size:
    """How many of whom, for how long."""

    seconds: float = 60.0
    submitters: int = 64
    pollers: int = 200
    listeners: int = 200
    drivers: int = 20


@dataclass(frozen=True)
class Outcome:
    """What was seen, and what is wrong with it."""

    seen: Seen
    problems: list[str]
    memory_mib: list[tuple[float, float]]  # (seconds, MiB)
    clients_cpu_s: float
    service_cpu_s: float

    def slope_mib_per_minute(self) -> float:
        """Least squares over the second half: the first fills caches."""
        late = self.memory_mib[len(self.memory_mib) // 2 :]
        seconds, mib = np.array(late).T
        return float(np.polyfit(seconds / 60, mib, 1)[0])


async def run(size: Size, directory: Path, model: Path) -> Outcome:
    """Start the service under `directory`, load it, and compare everybody's answers with the store."""
    port = free_port()
    home = directory / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.load.server", home, model.parent, str(port), str(size.drivers)]
    )
    try:
        url = f"http://127.0.0.1:{port}"
        body = await _body(url, model)
        load = Load(url, body, home / "jobs", time.monotonic() + size.seconds)
        clients, service = psutil.Process(), psutil.Process(process.pid)
        before_s = _cpu_s(clients), _cpu_s(service)
        await _drive_and_ask(load, size, service, memory := [])
        clients_s, service_s = _cpu_s(clients) - before_s[0], _cpu_s(service) - before_s[1]
        await load.close()
    finally:
        process.terminate()
        process.wait(30)
    with sqlite3.connect(f"file:{home / 'store.sqlite3'}?mode=ro", uri=True) as connection:
        stored = dict(connection.execute("SELECT key, job_id FROM idempotency").fetchall())
        events = dict(connection.execute("SELECT job_id, count(*) FROM events GROUP BY job_id").fetchall())
        number = connection.execute("SELECT count(*) FROM jobs").fetchone()[0]
    found = problems(load.seen, stored, events)
    if number != len(stored):
        found.append(f"{number} jobs from {len(stored)} keys")
    return Outcome(load.seen, found, memory, clients_s, service_s)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _drive_and_ask(
    load: Load, size: Size, service: psutil.Process, memory: list[tuple[float, float]]
) -> None:
    """Jobs for the drivers first; then everybody at once."""
    await load.prepare(size.drivers)
    streams = [asyncio.create_task(load.listen(load.jobs[i % len(load.jobs)])) for i in range(size.listeners)]
    watch = asyncio.create_task(_watch(service, memory))
    await asyncio.gather(
        *(load.submit(f"submitter-{i}") for i in range(size.submitters)),
        *(load.poll() for _ in range(size.pollers)),
        *(load.drive(job_id) for job_id in load.jobs),
    )
    await asyncio.sleep(2)  # what is under way
    for task in (watch, *streams):
        task.cancel()
    await asyncio.gather(watch, *streams, return_exceptions=True)


async def _watch(process: psutil.Process, memory: list[tuple[float, float]]) -> None:
    started = time.monotonic()
    while True:
        memory.append((time.monotonic() - started, process.memory_info().rss / 2**20))
        await asyncio.sleep(1.0)


async def _body(url: str, model: Path) -> dict[str, Any]:
    """Wait for the service, upload a small file, and name both in a job."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if (await http.get("/readyz")).status_code == 200:
                    break
            await asyncio.sleep(0.1)
        content = json.dumps({"prompt": "one plus one is", "completion": " two"}).encode() + b"\n"
        answer = await http.post(
            "/v1/files", files={"file": ("train.jsonl", content)}, data={"purpose": "fine-tune"}
        )
        return {"model": str(model), "training_file": answer.json()["id"]}


def figures(outcome: Outcome, size: Size) -> str:
    """One Markdown table."""
    seen = outcome.seen
    lines = [
        "| | |",
        "|---|---|",
        f"| submissions, of which repeated | {len(seen.submitted_s)}, {seen.repeated} |",
        f"| submission p50, p99 | {_ms(seen.submitted_s, 50)}, {_ms(seen.submitted_s, 99)} |",
        f"| poll p50, p99 | {_ms(seen.polled_s, 50)}, {_ms(seen.polled_s, 99)} ({len(seen.polled_s)} polls) |",
        f"| poll of a queued job p50, p99 | {_ms(seen.queued_s, 50)}, {_ms(seen.queued_s, 99)} |",
        f"| list of 20 jobs p50, p99 | {_ms(seen.listed_s, 50)}, {_ms(seen.listed_s, 99)} |",
        f"| event lag p50, p99 | {_ms(seen.lags_s, 50)}, {_ms(seen.lags_s, 99)} ({len(seen.lags_s)} arrivals) |",
        f"| processor time of the clients, of the service | {_each(outcome.clients_cpu_s, seen)},"
        f" {_each(outcome.service_cpu_s, seen)} a request ({seen.num_requests / size.seconds:.0f} requests a second) |",
        f"| memory at the end, slope | {outcome.memory_mib[-1][1]:.0f} MiB,"
        f" {outcome.slope_mib_per_minute():+.1f} MiB a minute over {size.seconds / 2:.0f} s |",
        f"| answers by status | {dict(sorted(seen.statuses.items()))} |",
        f"| lost or doubled | {'; '.join(outcome.problems) or 'nothing'} |",
    ]
    return "\n".join(lines)


def _each(seconds: float, seen: Seen) -> str:
    return f"{1000 * seconds / seen.num_requests:.1f} ms"


def _ms(values_s: list[float], percent: float) -> str:
    return f"{1000 * np.percentile(values_s, percent):.0f} ms"


def main() -> int:
    from tests.modeseek_ray.service.conftest import write_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    size = Size(seconds=parser.parse_args().seconds)
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        model = write_model(Path(name) / "models" / "base")
        outcome = asyncio.run(run(size, Path(name), model))
    print(figures(outcome, size))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
