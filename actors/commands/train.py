"""`modeseek run`: a job without the service, on a Ray that ends with it, or in this process alone."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.attempt_spec import AttemptResult, AttemptSpec
from actors.attempts import attempt_of, paths_as_written
from actors.cli.follow import Follower
from actors.commands.preflight import files_of, local_judges, local_model, preflight
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement
from actors.nodes import marked
from actors.placement import Placement
from actors.trackers import trackers_of
from modeseek_ray.config import read_config
from modeseek_ray.data.check import inspect_job
from modeseek_ray.jobs.paths import Home
from modeseek_ray.rewards.endpoints import read_endpoints

OnEvent = Callable[[Mapping[str, Any]], None]


def train(job_file: Path, out: Path, home: Home, *, local: bool) -> int:
    """Train, show it, write the report. Returns the exit code: 0 = trained to the end."""
    console = Console()
    spec = prepare(job_file, home, out.resolve())
    with Follower(console, title=job_file.name) as follower:
        result = run(spec, follower.show, local=local)
    if result.outcome.ended != "run":
        console.print(f"Stopped after step {result.outcome.state.step}; the same command resumes.")
        return 130
    if result.model_path is not None:  # a best-of-N job trains nothing
        console.print(f"Model   {result.model_path}", highlight=False, soft_wrap=True)
    for path in result.result_files:
        console.print(f"Result  {path}", highlight=False, soft_wrap=True)
    return 0


def prepare(job_file: Path, home: Home, out: Path) -> AttemptSpec:
    """Read and check a job file as the service would. Raises before anything is started."""
    config = read_config(job_file)
    files = files_of(config, job_file.parent)
    endpoints = read_endpoints(home.endpoints)
    model = local_model(config.model, home)
    behavior = None if config.behavior_model is None else local_model(config.behavior_model, home)
    preflight(config, inspect_job(config, files, model), model, has_behavior=behavior is not None)
    return AttemptSpec(
        job_id=out.name,
        attempt=1,
        config=config,
        files=files,
        model_path=model,
        behavior_model_path=behavior,
        judges=local_judges(config, endpoints, home),
        directory=out,
        cache=home.cache,
        endpoints=endpoints,
    )


def run(spec: AttemptSpec, on_event: OnEvent, *, local: bool) -> AttemptResult:
    """Run it to its end. Ctrl-C ends it after the current step, with a checkpoint to resume from."""
    sink = CallbackSink(on_event)
    results = spec.directory / "results"
    trackers = trackers_of(spec.config, results, spec.job_id)
    journal = ResultJournal(results, sink, attempt=spec.attempt, trackers=trackers)
    return asyncio.run(_run(spec, sink, journal, local))


async def _run(spec: AttemptSpec, sink: CallbackSink, journal: ResultJournal, local: bool) -> AttemptResult:
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, sink.interrupt)
    with paths_as_written(spec.config):
        return await attempt_of(spec, await _placement(spec, local), journal).run()


async def _placement(spec: AttemptSpec, local: bool) -> Placement:
    if local:
        return LocalPlacement()
    from actors.cluster import RayPlacement, check_nodes, connect

    connect()
    models = [path for path in (spec.model_path, spec.behavior_model_path) if path is not None]
    with marked(spec.directory, models) as shared:
        await check_nodes(shared)
    return RayPlacement(spec.config.resources)
