"""`modeseek demo`: from nothing to a comparison of two real jobs, over HTTP, on this machine.

A service of its own with Ray under it; plain SFT and a weighted job with the same budget on the
playground's MoE model; a table, and a report that compares the two.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cli.follow import Follower
from actors.cli.tables import comparison
from actors.local import free_port
from modeseek_ray.client import Client
from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.playground import data_files
from modeseek_ray.reports import summarize, write_comparison

MODEL = "playground/moe"
START_DEADLINE_S = 180.0
# The same budget for both jobs; only the weighting differs.
TRAINING = {
    "epochs": 2,
    "batch_size": 32,
    "max_steps": 200,
    "learning_rate": 7e-4,
    "warmup_share": 0.05,
    "decay": "linear",
    "evaluate_every": 20,
    "checkpoint_every": 100,
}
# A weighting and a regulariser are composed as in any job; both cost the new task little here.
KL = {"direction": "forward", "coefficient": 0.3}
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"type": "supervised", "supervised": {"training": TRAINING}},
    "anchored": {"type": "weighted", "weighted": {"preset": "anchored", "kl": KL, "training": TRAINING}},
}


def demo(home: Home, *, keep: bool) -> int:
    """Run it. Returns the exit code: 0 = both jobs succeeded."""
    from modeseek_ray.playground.build import build

    console = Console()
    console.rule("1. A small real model, made on this machine")
    console.print(f"{MODEL}: {build('moe', home.root)}", highlight=False)
    with _service(home, console, keep=keep) as url, Client(url) as client:
        console.rule("3. Two jobs over HTTP: plain SFT and a weighted one, same data, same budget")
        ids = [_submit(client, home, name, console) for name in JOBS]
        if not all([_follow(client, job_id, console) for job_id in ids]):
            return 1
        console.rule("4. What was learnt, and what was forgotten")
        results = [home.results(job_id) for job_id in ids]
        console.print(comparison([summarize(directory) for directory in results]))
        page = write_comparison(results, home.root / "demo.html")
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return 0


def job(name: str, home: Home) -> JobConfig:
    """One of the demo's jobs, with its files as paths."""
    files = data_files(home.root)
    return parse_config(
        {
            "model": MODEL,
            "training_file": str(files["new-task.train"]),
            "validation_file": str(files["new-task.valid"]),
            "retention_file": str(files["old-tasks.retention"]),
            "method": JOBS[name],
            "suffix": name,
            "resources": {"trainers": 2, "zero_stage": 2},
        }
    )


def _submit(client: Client, home: Home, name: str, console: Console) -> str:
    job_id: str = client.submit_files(job(name, home))["id"]
    console.print(f"{name}: {job_id}", highlight=False)
    return job_id


def _follow(client: Client, job_id: str, console: Console) -> bool:
    with Follower(console, title=client.job(job_id).get("suffix") or job_id) as follower:
        for event in client.stream(job_id):
            follower.show(event)
    ended = client.job(job_id)
    if ended["status"] != "succeeded":
        console.print(f"{job_id} {ended['status']}: {(ended.get('error') or {}).get('message')}", style="red")
    return bool(ended["status"] == "succeeded")


@contextmanager
def _service(home: Home, console: Console, *, keep: bool) -> Iterator[str]:
    """`modeseek serve` as a user would start it, on a free port; interrupted at the end."""
    console.rule("2. The service, with Ray under it")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = home.logs / "demo-serve.log"
    home.prepare()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "actors.main", "serve", "--port", str(port), "--home", str(home.root)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    try:
        _await(url, process, log)
        console.print(f"Serving at {url} (log: {log})", highlight=False, soft_wrap=True)
        yield url
    finally:
        if keep:
            console.print(
                f"The service goes on at {url}; end it with: kill -INT {process.pid}", highlight=False
            )
        elif process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    with Client(url) as client:
        while time.monotonic() < deadline and process.poll() is None:
            if client.is_ready():
                return
            time.sleep(0.5)
    raise WorkerError(
        "the service did not start.", mend=f"Its log is {log}; `modeseek doctor` looks further."
    )
