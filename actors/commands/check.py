"""`modeseek check`, `doctor` and `presets`: look before you train."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax

from actors.cli import checks
from actors.cli import doctor as examination
from actors.cli.outlook import show_look
from actors.cli.scale import show_scale
from actors.commands.outlook import Look, look, why_no_look, write_look
from actors.commands.preflight import files_of, local_model, preflight
from modeseek_ray.config import JobConfig, read_config
from modeseek_ray.data.check import inspect_job
from modeseek_ray.data.report import DataReport
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.hardware import PUBLISHED, hardware_of
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.scale import Scale, scale
from modeseek_ray.weights import PRESETS, preset_fields


@dataclass(frozen=True)
class LookOptions:
    """How to look at the rows before training; without `score` the model is not loaded."""

    score: bool = False
    presets: tuple[str, ...] = ()  # beside the job's own weighting; none = outlook.SHOWN_BESIDE
    rows: int = 2000  # at most; 0 = all
    html: Path | None = None
    plan: bool = False  # also how memory is estimated, and how long it takes, on `hardware`
    hardware: str | None = None  # None: this machine's cores, or an H100 where the job asks for GPUs
    gpus: int | None = None  # to divide between trainers and engines; None = as the job has it


def check(job_file: Path, home: Home, options: LookOptions, *, as_json: bool = False) -> int:
    """Print what the data holds and the plan. Raises the first problem, after showing all of the data's."""
    config = read_config(job_file)
    files = files_of(config, job_file.parent)
    model = local_model(config.model, home)
    behavior = None if config.behavior_model is None else local_model(config.behavior_model, home)
    console = Console(quiet=as_json)
    data = inspect_job(config, files, model)
    console.print(checks.show_data(data.to_dict()))
    found = preflight(config, data, model, has_behavior=behavior is not None)
    console.print(checks.show_plan(found.plan, in_full=options.plan))
    scaled = None
    if options.plan:
        scaled = _scale(config, model, data, options)
        console.print(show_scale(scaled))
        if config.online is not None:
            console.print(
                f"New weights travel by {TRANSFERS[config.resources.weight_transfer]}.", style="dim"
            )
    no_look = why_no_look(config) if options.score else None
    if no_look is not None:
        found = replace(found, warnings=(*found.warnings, no_look))
    for warning in found.warnings:
        console.print(f"warning: {warning.param or ''}: {warning.message}", style="yellow", highlight=False)
    answer = found.to_dict()
    if scaled is not None:
        answer["scale"] = scaled.to_dict()
    if options.score and no_look is None:
        seen = _look(config, files["training_file"], model, home, behavior, options, console)
        answer["outlook"] = seen.to_dict()
        if options.html is not None:
            write_look(seen, options.html, job_file.stem, files["training_file"])
            console.print(f"Page    {options.html}", highlight=False, soft_wrap=True)
    console.print(
        f"This job can run: modeseek submit {job_file} --follow",
        style="green",
        highlight=False,
        soft_wrap=True,
    )
    if as_json:
        json.dump(answer, sys.stdout, allow_nan=False, ensure_ascii=False, indent=1)
        sys.stdout.write("\n")
    return 0


TRANSFERS = {
    "object_store": "host memory (weight_transfer: object_store); an engine that dies is brought along",
    "nccl": "NCCL from GPU to GPU (weight_transfer: nccl, not yet run); an engine that dies costs the attempt",
    "ipc": "CUDA IPC within each GPU (weight_transfer: ipc, not yet run); an engine that dies costs the attempt",
}


def _scale(config: JobConfig, model: Path, data: DataReport, options: LookOptions) -> Scale:
    resources = config.resources
    name = options.hardware or ("h100" if resources.gpus_per_worker else "cpu")
    if name == "cpu" and resources.gpus_per_worker:
        raise ConfigError(
            "the job asks for GPUs.",
            param="--hardware",
            mend=f"Choose one of: {', '.join(PUBLISHED)}; or set resources.gpus_per_worker to 0.",
        )
    hardware = hardware_of(name, threads=max(1, int(resources.cpus_per_worker)))
    engines = resources.generators * resources.tensor_parallel
    gpus = options.gpus or (resources.trainers + engines if resources.gpus_per_worker else None)
    return scale(config, ModelInfo.read(model), hardware, data, total_gpus=gpus)


def _look(
    config: JobConfig,
    training_file: Path,
    model: Path,
    home: Home,
    behavior: Path | None,
    options: LookOptions,
    console: Console,
) -> Look:
    with Progress(console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("Scoring under the start", total=None)
        seen = look(
            config,
            training_file,
            model,
            home.cache,
            behavior_model=behavior,
            presets=options.presets,
            rows=options.rows,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(show_look(seen))
    return seen


def doctor(home: Home, url: str) -> int:
    """Print the examination. Exit code 1 if something needs mending."""
    found = examination.collect(home.root, url, home.storage)
    Console().print(examination.show(found))
    return 0 if all(c.ok for c in found) else 1


def presets(name: str | None) -> None:
    """All presets with a line each, or one as the fields it stands for."""
    console = Console()
    if name is None:
        for each, preset in PRESETS.items():
            console.print(f"[bold]{each:16}[/] {preset.what}", highlight=False)
        return
    preset = PRESETS[name]
    about = {
        "What": preset.what,
        "Source": preset.source,
        "Compared with": preset.checked,
        "What differs": preset.differs,
    }
    for label, text in about.items():  # as comments, so that the whole is a piece of a job's file
        console.print(f"# {label}: {text}", style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(
        Syntax(yaml.safe_dump(preset_fields(name), sort_keys=False), "yaml", background_color="default")
    )
