"""`modeseek demo`: from nothing to a comparison of three real jobs, over HTTP, on this machine.

A service of its own with Ray under it; on the playground's MoE model plain SFT, a weighted job with
the same budget, and an online job that learns from graded attempts of its own; a table, and a report
that compares them. With seeds, the online job alone, once for each of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cli.follow import Follower
from actors.cli.format import sparkline
from actors.cli.tables import comparison
from actors.network import free_port
from modeseek_ray.client import Client
from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.playground import data_files
from modeseek_ray.reports import JobSummary, summarize, write_comparison
from modeseek_ray.reports.results import read_metrics
from modeseek_ray.types import FloatArray

MODEL = "playground/moe"
START_DEADLINE_S = 180.0
LEARNT = 0.8  # accuracy on the new task that each job has to end with
LEAST_RISE = 0.2  # of the mean reward, from the first two rounds to the last five
# The same budget for both offline jobs; only the weighting differs.
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
OFFLINE: dict[str, dict[str, Any]] = {
    "sft": {"type": "supervised", "supervised": {"training": TRAINING}},
    "anchored": {"type": "weighted", "weighted": {"preset": "anchored", "kl": KL, "training": TRAINING}},
}
# The model's own attempts, right ones rewarded; no answer is ever shown to it.
ONLINE: dict[str, Any] = {
    "type": "online",
    "online": {
        "reward": {"scheme": "exponential", "beta": 0.2, "scope": "group"},
        "grader": {
            "type": "string_check",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.reference }}",
            "operation": "eq",
        },
        "rollout": {"samples_per_prompt": 8, "prompts_per_round": 16, "max_tokens": 12},
        "training": {
            "max_steps": 50,
            "learning_rate": 5e-4,
            "evaluate_every": 10,
            "checkpoint_every": 25,
        },
    },
}
JOBS = {**OFFLINE, "online": ONLINE}


def demo(home: Home, *, keep: bool, seeds: Sequence[int] = ()) -> int:
    """Run it. Returns the exit code: 0 = every job succeeded and learnt what it was to learn."""
    from modeseek_ray.playground.build import build

    console = Console()
    jobs = {f"online, seed {seed}": job("online", home, seed) for seed in seeds}
    what = f"The online job over HTTP, with {len(jobs)} seeds"
    if not jobs:
        jobs = {name: job(name, home) for name in JOBS}
        what = "Three jobs over HTTP: plain SFT, a weighted one with the same budget, an online one"
    console.rule("1. A small real model, made on this machine")
    console.print(f"{MODEL}: {build('moe', home.storage)}", highlight=False)
    with _service(home, console, keep=keep) as url, Client(url) as client:
        console.rule(f"3. {what}")
        ids = {name: _submit(client, config, name, console) for name, config in jobs.items()}
        if not all([_follow(client, job_id, console) for job_id in ids.values()]):
            return 1
        console.rule("4. What was learnt, and what was forgotten")
        results = {name: home.results(job_id) for name, job_id in ids.items()}
        summaries = {name: summarize(directory) for name, directory in results.items()}
        console.print(comparison(list(summaries.values())))
        if not seeds:
            console.print(
                "sft and anchored learn from answers in four formats; online is shown questions of three letters"
                " alone and learns from what its own attempts were worth.",
                style="dim",
            )
        rewards = {name: rewards_of(results[name]) for name in results if name.startswith("online")}
        for name, rewards_S in rewards.items():
            console.print(f"{name}, {told(rewards_S)}", highlight=False)
        page = write_comparison(list(results.values()), home.root / "demo.html")
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    missed = [*unlearnt(summaries), *(unrewarded(rewards) if seeds else [])]
    for each in missed:
        console.print(each, style="red", highlight=False)
    return 1 if missed else 0


def unlearnt(summaries: Mapping[str, JobSummary]) -> list[str]:
    """A sentence for each job that ended below `LEARNT` on the new task, or did not measure it."""
    found = []
    for name, summary in summaries.items():
        task = summary.new_task
        if task is None or task.measure != "accuracy":
            found.append(f"{name}: the new task was never solved, or not measured; .8 was wanted.")
        elif task.after < LEARNT:
            found.append(f"{name}: the new task ended at {task.after:.2f}, below {LEARNT:g}.")
    return found


def unrewarded(rewards: Mapping[str, FloatArray]) -> list[str]:
    """A sentence for each job whose mean reward rose by less than `LEAST_RISE`."""
    rises = {name: rise(rewards_S) for name, rewards_S in rewards.items()}
    return [
        f"{name}: the mean reward rose by {by:.2f}, less than {LEAST_RISE:g}."
        for name, by in rises.items()
        if not by >= LEAST_RISE  # not a number, where there were no rounds
    ]


def rise(rewards_S: FloatArray) -> float:
    """Mean reward of the last five rounds minus that of the first two; NaN with fewer than seven."""
    return float(rewards_S[-5:].mean() - rewards_S[:2].mean()) if len(rewards_S) >= 7 else float("nan")


def rewards_of(results: Path) -> FloatArray:
    """The mean reward of each round."""
    return read_metrics(results).known("rollout.reward")[1]


def told(rewards_S: FloatArray) -> str:
    """How the mean reward of the rounds rose."""
    first, last = float(rewards_S[:2].mean()), float(rewards_S[-5:].mean())
    return (
        f"mean reward: {first:.2f} in the first two rounds, {last:.2f} in the last five, a rise of"
        f" {rise(rewards_S):.2f}  {sparkline(list(rewards_S), 40)}"
    )


def job(name: str, home: Home, seed: int = 0) -> JobConfig:
    """One of the demo's jobs, with its files as paths."""
    files = data_files(home.storage)
    training, validation = ("new-task.prompts", "new-task.prompts-valid")
    if name in OFFLINE:
        training, validation = ("new-task.train", "new-task.valid")
    return parse_config(
        {
            "model": MODEL,
            "training_file": str(files[training]),
            "validation_file": str(files[validation]),
            "retention_file": str(files["old-tasks.retention"]),
            "method": JOBS[name],
            "suffix": name if seed == 0 else f"{name}-{seed}",
            "seed": seed,
            "resources": {"trainers": 2, "zero_stage": 2},
        }
    )


def _submit(client: Client, config: JobConfig, name: str, console: Console) -> str:
    job_id: str = client.submit_files(config)["id"]
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
