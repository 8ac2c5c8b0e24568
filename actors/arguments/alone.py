"""What needs no running service: looking ahead, training on one machine, reports, the playground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.arguments.shared import DEFAULT_URL, HomeDir, JobFile, Url, home_at


def check(
    job: JobFile,
    score: Annotated[
        bool,
        typer.Option("--score", help="Also score rows under the start and show what weightings would do."),
    ] = False,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset to look at beside the job's own weighting. Repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Most rows to score; 0 = all.")] = 2000,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Also estimate times: step by part, sync, the best division of GPUs."),
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Of the plan: `cpu` (measured here), `a100`, `h100`, `h200` or `b200`. Implies --plan."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=2, help="GPUs to divide between trainers and engines. Default: as many as the job asks for."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the outlook as a page with plots.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    home: HomeDir = None,
) -> None:
    """Look before you train: problems in the data, the plan of processes and memory, steps. Starts nothing.

    With --score (or --preset, --html, which imply it): ESS, gamma, and who would starve or dominate.
    """
    from actors.commands.check import LookOptions
    from actors.commands.check import check as run_check

    options = LookOptions(
        score=score or bool(preset) or html is not None, presets=tuple(preset or ()), rows=rows, html=html,
        plan=plan or hardware is not None or gpus is not None, hardware=hardware, gpus=gpus,
    )  # fmt: skip
    raise typer.Exit(run_check(job, home_at(home), options, as_json=json))


def run(
    job: JobFile,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for results and the model. Default: `runs/<job file's name>`."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Everything in this process, without Ray: for a debugger.")
    ] = False,
    home: HomeDir = None,
) -> None:
    """Train without the service, on a Ray that ends with the command. Run again to resume."""
    from actors.commands.train import train

    raise typer.Exit(train(job, out or Path("runs") / job.stem, home_at(home), local=local))


def report(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB…", help="Job ids, or result directories.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write. Default: in the (first) job's results.")
    ] = None,
    home: HomeDir = None,
) -> None:
    """Write the HTML report of a job, or one that compares several. Prints its path."""
    from actors.commands.report import report as write

    write(jobs, out, home_at(home))


def doctor(url: Url = DEFAULT_URL, home: HomeDir = None) -> None:
    """Check this machine: versions, ports, disk, memory, Ray, GPU. Says how to mend what is wrong."""
    from actors.commands.check import doctor as run_doctor

    raise typer.Exit(run_doctor(home_at(home), url))


def playground(
    name: Annotated[str, typer.Argument(help="`moe` or `dense`.")] = "moe",
    seed: Annotated[int, typer.Option(help="Another seed, another base model.")] = 0,
    home: HomeDir = None,
) -> None:
    """Build a small real model and its data on this machine (some minutes, cached)."""
    from modeseek_ray.playground.build import build

    typer.echo(build(name, home_at(home).storage, seed=seed))


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    shown: Annotated[str | None, typer.Argument(hidden=True)] = None,
) -> None:
    """List the named weightings, or print what one is made of (`modeseek presets show iw_sft`, or without `show`)."""
    from actors.commands.check import presets as show_presets
    from modeseek_ray.weights import PRESETS

    if shown is not None and name != "show":
        raise typer.BadParameter(f"{name!r} is followed by {shown!r}; name one preset.")
    wanted = name if shown is None else shown
    if wanted is not None and wanted not in PRESETS:
        raise typer.BadParameter(f"there is no preset {wanted!r}; choose one of {', '.join(PRESETS)}.")
    show_presets(wanted)


def rerank(
    rows: Annotated[Path, typer.Argument(help="Answers, several per prompt; some with a `reward`.")],
    model: Annotated[str, typer.Option(help="Whose hidden states the answers are compared in.")],
    out: Annotated[Path | None, typer.Option(help="Write the picked rows here, one per prompt.")] = None,
    beta: Annotated[
        float, typer.Option(min=1e-9, help="Reward units: smaller ranks by rewards harder.")
    ] = 1.0,
    ridge: Annotated[float, typer.Option(min=0.0, help="Added to the features' variances.")] = 1e-3,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every weight.")] = False,
    home: HomeDir = None,
) -> None:
    """Pick the best answer of each prompt by the first-order solution, graded or not. Trains nothing."""
    from actors.commands.preflight import local_model
    from actors.commands.rerank import rerank as run_rerank

    raise typer.Exit(
        run_rerank(rows, local_model(model, home_at(home)), out, beta=beta, ridge=ridge, as_json=json)
    )


def demo(
    home: HomeDir = None,
    keep: Annotated[bool, typer.Option(help="Leave the service running afterwards.")] = False,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="Run the online job alone, once for each seed, and see how far its reward rises."),
    ] = None,
    more_seeds: Annotated[list[int] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """From nothing to a comparison: a service, three real jobs over HTTP on the MoE playground model, a report.

    `--seeds 0 1 2` runs the online job with each of these seeds instead. The exit code is 1 where a job failed,
    ended below .8 on the new task, or (with seeds) rose by less than .2 in mean reward.
    """
    from actors.commands.demo import demo as run_demo

    if more_seeds and not seeds:
        raise typer.BadParameter(f"{more_seeds[0]} belongs to no option; did you mean --seeds?")
    raise typer.Exit(run_demo(home_at(home), keep=keep, seeds=[*(seeds or ()), *(more_seeds or ())]))
