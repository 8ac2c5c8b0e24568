"""Commands that speak to a running service: submit, follow, list, show, logs, cancel, pause, resume."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from actors.cli.follow import Follower
from actors.cli.tables import checkpoint_list, job_details, job_list
from modeseek_ray.client import Client
from modeseek_ray.config import read_config


def submit(url: str, api_key: str | None, job_file: Path, *, follow: bool) -> int:
    """Upload, create, print the id; with `follow` stay until the job ends, and return as `follow` does."""
    config = read_config(job_file)
    with Client(url, api_key) as client:
        job = client.submit_files(config, job_file.parent)
    print(job["id"], flush=True)
    # Not on stdout, which is for `JOB=$(modeseek submit …)`.
    said = Console(stderr=True, highlight=False, soft_wrap=True, style="dim")
    said.print(f"Its page: {url.rstrip('/')}/#/jobs/{job['id']}")
    if follow:
        return _follow(url, api_key, job["id"])
    said.print(f"Watch it: modeseek follow {job['id']}")
    return 0


def follow(url: str, api_key: str | None, job_id: str) -> int:
    """Show a job's events until it ends. Exit code 0 = succeeded, 1 = it ended otherwise, 130 = Ctrl-C."""
    return _follow(url, api_key, job_id)


def list_jobs(url: str, api_key: str | None, limit: int, *, ids_only: bool = False) -> None:
    with Client(url, api_key) as client:
        jobs = client.jobs(limit)
    if ids_only:
        print("\n".join(job["id"] for job in jobs))
    else:
        Console().print(job_list(jobs))


def show(url: str, api_key: str | None, job_id: str) -> None:
    console = Console()
    with Client(url, api_key) as client:
        console.print(job_details(client.job(job_id)))
        console.print(checkpoint_list(client.checkpoints(job_id)))


def cancel(url: str, api_key: str | None, job_id: str) -> None:
    with Client(url, api_key) as client:
        Console().print(job_details(client.cancel(job_id)))


def logs(url: str, api_key: str | None, job_id: str, attempt: int | None) -> None:
    with Client(url, api_key) as client:
        print(client.logs(job_id, attempt), end="")


def pause(url: str, api_key: str | None, job_id: str) -> None:
    with Client(url, api_key) as client:
        Console().print(job_details(client.pause(job_id)))


def resume(url: str, api_key: str | None, job_id: str, trainers: int | None) -> None:
    with Client(url, api_key) as client:
        Console().print(job_details(client.resume(job_id, trainers=trainers)))


def _follow(url: str, api_key: str | None, job_id: str) -> int:
    console = Console()
    with Client(url, api_key) as client:
        try:
            with Follower(console, title=job_id) as follower:
                for event in client.stream(job_id):
                    follower.show(event)
        except KeyboardInterrupt:
            console.print(f"The job goes on. Watch it again with: modeseek follow {job_id}")
            return 130
        job = client.job(job_id)
        console.print(job_details(job))
    if job["status"] != "succeeded":
        return 1
    if model := job.get("fine_tuned_model"):
        console.print(f'Ask it: modeseek ask {model} "…"', style="dim", highlight=False, soft_wrap=True)
    console.print(
        f"Compare: modeseek report {job_id} OTHER-JOB", style="dim", highlight=False, soft_wrap=True
    )
    return 0
