"""How long a user waits: submitting a job, and an event from the driver's report to the follower's screen.

    python -m tests.bench.service [--jobs 50 200 800] [--events 100 1000 10000] [--json results.json]

A real service on 127.0.0.1 with its store on disk, in a process of its own. Submissions come from the
unmodified `openai` client, one after the other, with so many jobs in the queue already. Events are
reported one at a time by what a driver reports with, while one client follows the job's stream that
holds so many events already; the time is from the report's begin until the follower has it. The
log-log slope says how both grow: 0 is not at all, 1 in proportion.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.network import free_port
from modeseek_ray.client import AttemptClient, Client
from modeseek_ray.jobs.paths import Home

ROOT = Path(__file__).parents[2]
MEASURED = 50  # requests at each size
FILL = 500  # events reported together, to get to a size
START_DEADLINE_S = 60.0


@contextmanager
def service(directory: Path, *, cluster: bool) -> Iterator[str]:
    """Its address. `cluster`: jobs are started, by a launcher that leaves the driver's part to us."""
    port = free_port()
    if cluster:
        module = ["tests.bench.service", "--host", str(directory), str(port)]
    else:
        places = ["--home", str(directory / "home"), "--root", str(directory / "models")]
        module = ["modeseek_ray.service", *places, "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        with Client(url) as client:
            deadline = time.monotonic() + START_DEADLINE_S
            while not client.is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the service did not start")
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _model(directory: Path) -> Path:
    from tests.modeseek_ray.service.conftest import write_model

    path = directory / "models" / "base"
    return path if path.exists() else write_model(path)


def submissions(sizes: Sequence[int]) -> dict[int, list[float]]:
    """Seconds of `MEASURED` submissions each, with so many jobs in the queue."""
    from openai import OpenAI

    found: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        directory = Path(scratch)
        model = _model(directory)
        with service(directory, cluster=False) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
            rows = b'{"prompt": "one plus one is", "completion": " two"}\n' * 100
            file = client.files.create(file=("train.jsonl", rows), purpose="fine-tune")

            def submit() -> float:
                started = time.perf_counter()
                client.fine_tuning.jobs.create(model=str(model), training_file=file.id)
                return time.perf_counter() - started

            stored = 0
            for size in sizes:
                while stored < size:
                    submit()
                    stored += 1
                found[size] = [submit() for _ in range(MEASURED)]
                stored += MEASURED
    return found


def event_delays(sizes: Sequence[int]) -> dict[int, list[float]]:
    """Seconds from a driver's report until a follower has it, with so many events of the job stored."""
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        directory = Path(scratch)
        model = _model(directory)
        with service(directory, cluster=True) as url, Client(url) as client:
            data = directory / "models" / "train.jsonl"
            data.write_text('{"prompt": "one plus one is", "completion": " two"}\n' * 3)
            job_id = client.submit({"model": str(model), "training_file": client.upload(data)["id"]})["id"]
            return asyncio.run(_follow(url, job_id, Home(directory / "home"), sizes))


async def _follow(url: str, job_id: str, home: Home, sizes: Sequence[int]) -> dict[int, list[float]]:
    secret = json.loads((await _written(home.secret(job_id, 1))).read_text())
    driver = AttemptClient(url, job_id, secret["attempt"], token=secret["token"], fence=secret["fence"])
    while (await asyncio.to_thread(_state, url, job_id)) == "validating_files":
        await asyncio.sleep(0.05)
    await driver.transition("running")
    arrived: queue.Queue[tuple[int, float]] = queue.Queue()

    def read() -> None:
        with Client(url) as reader:
            for event in reader.stream(job_id):
                number = (event.get("data") or {}).get("number")
                if number is not None:
                    arrived.put((number, time.perf_counter()))

    follower = threading.Thread(target=read, daemon=True)
    follower.start()
    found: dict[int, list[float]] = {}
    sequence = 0
    for size in sizes:
        while sequence < size:
            count = min(FILL, size - sequence)
            await driver.events([_event(sequence + 1 + i) for i in range(count)])
            sequence += count
        while (await asyncio.to_thread(arrived.get, True, 30))[0] < sequence:
            pass
        found[size] = []
        for _ in range(MEASURED):
            sequence += 1
            started = time.perf_counter()
            await driver.events([_event(sequence)])
            number, moment = await asyncio.to_thread(arrived.get, True, 30)
            if number != sequence:
                raise RuntimeError(f"event {number} came where {sequence} was expected")
            found[size].append(moment - started)
    await driver.transition("failed", error={"code": "numerics", "message": "the benchmark is over"})
    await driver.close()
    follower.join(30)
    return found


def _event(number: int) -> dict[str, Any]:
    figures = {f"figure_{i}": i / 7 for i in range(20)}  # as many as a step reports
    return {"seq": number, "type": "metrics", "message": "step", "data": {"number": number, **figures}}


def _state(url: str, job_id: str) -> str:
    with Client(url) as client:
        return str(client.job(job_id)["status"])


async def _written(path: Path) -> Path:
    deadline = time.monotonic() + START_DEADLINE_S
    while not path.is_file():
        if time.monotonic() > deadline:
            raise RuntimeError("the job was not started")
        await asyncio.sleep(0.05)
    return path


def host(directory: Path, port: int) -> None:
    """A service whose jobs are started by nobody: until this process is ended."""
    from tests.modeseek_ray.service.conftest import serving

    with serving(directory, port=port):
        threading.Event().wait()


def slope(found: dict[int, list[float]]) -> float:
    """Of log median over log size."""
    sizes = sorted(found)
    if len(sizes) < 2:
        return float("nan")
    medians = [np.median(found[size]) for size in sizes]
    return float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])


def table(results: dict[str, dict[int, list[float]]]) -> Table:
    shown = Table("what", "with so many stored", "p50 ms", "p99 ms", title="Service")
    for what, found in results.items():
        for size, seconds in found.items():
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            shown.add_row(what, f"{size:,}", f"{p50:.1f}", f"{p99:.1f}")
        shown.add_row(what, "log-log slope", f"{slope(found):.2f}", "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--events", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--json", type=Path, help="write the seconds here, too")
    parser.add_argument("--host", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        host(Path(options.host[0]), int(options.host[1]))
        return
    results = {"submission": submissions(options.jobs), "event": event_delays(options.events)}
    Console().print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
