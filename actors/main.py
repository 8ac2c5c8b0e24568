"""The `modeseek` command: composition root, the only file that knows everybody.

Each command here parses and hands over; what it does lives in `actors/commands`, how it looks in
`actors/cli`. Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="modeseek",
    help="Fine-tuning that decides how much each sample counts. Begin with `modeseek demo`, or with"
    " `modeseek serve` in one terminal and `modeseek submit job.yaml --follow` in another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

JobFile = Annotated[
    Path, typer.Argument(metavar="JOB.yaml", help="A job file, YAML or JSON. `deploy/jobs` has examples.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job id, `ftjob-…`; `modeseek list` shows them.")]
Url = Annotated[str, typer.Option(envvar="MODESEEK_URL", help="Where the service is.")]
Key = Annotated[
    str | None, typer.Option(envvar="MODESEEK_API_KEY", help="An API key, where the service has keys.")
]
HomeDir = Annotated[
    Path | None, typer.Option(envvar="MODESEEK_HOME", help="State lives here. Default: `~/.modeseek`.")
]
DEFAULT_URL = "http://127.0.0.1:8420"


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Anything but loopback needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8420,
    home: HomeDir = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Dashboard URL of a Ray cluster to use instead of a new head, `http://host:8265`."),
    ] = None,
    autoscaling: Annotated[
        bool,
        typer.Option("--autoscaling", help="That cluster grows on demand: refuse no job for its size."),
    ] = False,
    ray_cpus: Annotated[
        int | None, typer.Option(help="Logical CPUs of the new head. Default: 8, or the cores if more.")
    ] = None,
    max_running_jobs: Annotated[
        int, typer.Option(min=1, help="Jobs that train at the same time; others queue.")
    ] = 1,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="Directory under which models and data may be named by path. Repeatable."),
    ] = None,
    pause_grace: Annotated[
        float, typer.Option(min=0, help="Seconds a job has to save and pause; then it is stopped.")
    ] = 300.0,
    lease: Annotated[
        float, typer.Option(min=2, help="Seconds a driver may be silent; then its job gets a new attempt.")
    ] = 60.0,
    deadline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION=SECONDS",
            help="Longest a job may be at `setup`, `score`, `rollout`, `step`, `evaluate`, `sync`,"
            " `checkpoint` or `export` without an end; then it gets a new attempt. Repeatable.",
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of one tenant. Default: any number.")
    ] = None,
    webhook_network: Annotated[
        list[str] | None,
        typer.Option(help="Private network that webhooks may be sent to, `10.0.0.0/8`. Repeatable."),
    ] = None,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="One JSON object a line on stderr.")] = False,
) -> None:
    """Start the service and a Ray head on this machine. Ctrl-C ends both; jobs go on at the next start."""
    from actors.commands.serve import ServeOptions
    from actors.commands.serve import serve as run_service

    options = ServeOptions(
        host=host, port=port, home=_home(home).root, ray_address=ray_address, ray_cpus=ray_cpus,
        max_running_jobs=max_running_jobs, roots=tuple(root or ()), pause_grace_s=pause_grace,
        requests_per_minute=requests_per_minute, webhook_networks=tuple(webhook_network or ()),
        log_format="json" if json_logs else "text", autoscaling=autoscaling,
        lease_s=lease, deadlines_s=_deadlines(deadline) if deadline else {},
    )  # fmt: skip
    run_service(options)


@app.command()
def submit(
    job: JobFile,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and watch it train.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Upload a job's files and submit it. Prints the job's id. With --follow the exit code is 1 unless it succeeds."""
    from actors.commands import remote

    raise typer.Exit(remote.submit(url, api_key, job, follow=follow))


@app.command()
def follow(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Watch a job: step, loss, ESS/n, gamma, retention, tokens per second, time left. Ctrl-C leaves it running."""
    from actors.commands import remote

    raise typer.Exit(remote.follow(url, api_key, job))


@app.command()
def ask(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A finished model (`ft:…`), the job that made it (`ftjob-…`), a checkpoint (`ft:…:ckpt-step-N`),"
            " or a base model such as `playground/moe`.",
        ),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask; `-` reads it from stdin.")],
    completion: Annotated[
        bool, typer.Option("--completion", help="Continue the text as it is, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message in front.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=128, help="Answers to print.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(min=1, max=128, help="Answers to write, of which the best `n` are printed.")
    ] = None,
    grader: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON with a grader, as a job has it: the best are those it grades highest."
        ),
    ] = None,
    item: Annotated[
        str | None, typer.Option(help="JSON object that the grader's templates call `item`.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 = the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer. Repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the service's answer as it is.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Ask a model of the service. The first question loads it, which takes a while.

    `modeseek ask playground/moe "sort: d b a c"`

    `modeseek ask ft:… "12 * 13 =" --best-of 16 --grader grader.yaml --item '{"reference": "156"}'`
    samples 16 answers, grades them and prints the best. Without a grader the likeliest is the best.
    """
    from actors.commands.ask import Question
    from actors.commands.ask import ask as run_ask

    question = Question(
        model=model, prompt=prompt, completion=completion, system=system, n=n, best_of=best_of, grader=grader,
        item=item, max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    run_ask(url, api_key, question, as_json=json)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    ids: Annotated[bool, typer.Option("--ids", help="Ids alone, one a line: for scripts.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """List jobs, newest first."""
    from actors.commands import remote

    remote.list_jobs(url, api_key, limit, ids_only=ids)


@app.command()
def show(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show a job's state, figures, checkpoints and, if it failed, how to mend it."""
    from actors.commands import remote

    remote.show(url, api_key, job)


@app.command()
def logs(
    job: JobId,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Which attempt's driver. Default: the newest.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Print what a job's driver printed: for a traceback, when the events are not enough."""
    from actors.commands import remote

    remote.logs(url, api_key, job, attempt)


@app.command()
def cancel(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Cancel a job. Its checkpoints stay."""
    from actors.commands import remote

    remote.cancel(url, api_key, job)


@app.command()
def pause(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Pause a job: it saves a checkpoint and frees its workers. `modeseek resume` goes on exactly there."""
    from actors.commands import remote

    remote.pause(url, api_key, job)


@app.command()
def resume(
    job: JobId,
    trainers: Annotated[
        int | None,
        typer.Option(min=1, help="Go on with so many trainers (below ZeRO-3): not bit for bit as before."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Let a paused job go on from where it was; a failed one as a new job."""
    from actors.commands import remote

    remote.resume(url, api_key, job, trainers)


@app.command()
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
    raise typer.Exit(run_check(job, _home(home), options, as_json=json))


@app.command()
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

    raise typer.Exit(train(job, out or Path("runs") / job.stem, _home(home), local=local))


@app.command()
def report(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB…", help="Job ids, or result directories.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write. Default: in the (first) job's results.")
    ] = None,
    home: HomeDir = None,
) -> None:
    """Write the HTML report of a job, or one that compares several. Prints its path."""
    from actors.commands.report import report as write

    write(jobs, out, _home(home))


@app.command()
def doctor(url: Url = DEFAULT_URL, home: HomeDir = None) -> None:
    """Check this machine: versions, ports, disk, memory, Ray, GPU. Says how to mend what is wrong."""
    from actors.commands.check import doctor as run_doctor

    raise typer.Exit(run_doctor(_home(home), url))


@app.command()
def playground(
    name: Annotated[str, typer.Argument(help="`moe` or `dense`.")] = "moe",
    seed: Annotated[int, typer.Option(help="Another seed, another base model.")] = 0,
    home: HomeDir = None,
) -> None:
    """Build a small real model and its data on this machine (some minutes, cached)."""
    from modeseek_ray.playground.build import build

    typer.echo(build(name, _home(home).storage, seed=seed))


@app.command()
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


@app.command()
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
        run_rerank(rows, local_model(model, _home(home)), out, beta=beta, ridge=ridge, as_json=json)
    )


keys_app = typer.Typer(
    help="API keys. Until the first is made, anybody on this machine may use the service.",
    no_args_is_help=True,
)
app.add_typer(keys_app, name="keys")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is; for your own list.")],
    tenant: Annotated[str, typer.Option(help="Files and jobs are seen within a tenant only.")] = "default",
    read_only: Annotated[bool, typer.Option("--read-only", help="It may look, and change nothing.")] = False,
    home: HomeDir = None,
) -> None:
    """Make a key and print it, once. A running service knows it at once."""
    from actors.commands import keys

    keys.create(_home(home), name, tenant, read_only=read_only)


@keys_app.command("list")
def list_keys(home: HomeDir = None) -> None:
    """List keys. The keys themselves are not stored."""
    from actors.commands import keys

    keys.list_keys(_home(home))


@keys_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="The id that `modeseek keys list` shows.")],
    home: HomeDir = None,
) -> None:
    """Refuse a key from the next request on. After the last one nobody is answered."""
    from actors.commands import keys

    keys.revoke(_home(home), key)


@keys_app.command("remove-all")
def remove_all_keys(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeDir = None,
) -> None:
    """Need no keys any more: every program of this machine is answered, as before the first key."""
    from actors.commands import keys

    keys.remove_all(_home(home), confirmed=yes)


tenants_app = typer.Typer(
    help="Who shares this installation. A tenant comes into being with its first key.", no_args_is_help=True
)
app.add_typer(tenants_app, name="tenants")


@tenants_app.command("list")
def list_tenants(home: HomeDir = None) -> None:
    """List tenants, their limits and how much they keep."""
    from actors.commands import keys

    keys.list_tenants(_home(home))


@tenants_app.command("limit")
def limit_tenant(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    priority: Annotated[int | None, typer.Option(help="Of its jobs; higher is served first.")] = None,
    max_running_jobs: Annotated[int | None, typer.Option(help="Jobs at a time; -1 = any number.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Of uploaded files; -1 = any number.")] = None,
    max_files: Annotated[int | None, typer.Option(help="Files it keeps; -1 = any number.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="-1 = as the service was started.")] = None,
    home: HomeDir = None,
) -> None:
    """Set some of a tenant's limits. Stop the service first."""
    from actors.commands import keys

    limits = {
        "priority": priority,
        "max_running_jobs": max_running_jobs,
        "max_bytes": max_bytes,
        "max_files": max_files,
        "requests_per_minute": requests_per_minute,
    }
    keys.limit(_home(home), tenant, limits)


@app.command()
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
    raise typer.Exit(run_demo(_home(home), keep=keep, seeds=[*(seeds or ()), *(more_seeds or ())]))


@app.command(hidden=True)
def drive(
    job: Annotated[str, typer.Option()],
    attempt: Annotated[int, typer.Option()],
    secret: Annotated[Path, typer.Option()],
    home: Annotated[Path, typer.Option()],
) -> None:
    """One attempt at a job; started by the service as a Ray job."""
    from actors.commands.drive import drive as run_attempt

    raise typer.Exit(run_attempt(job, attempt, secret, home))


@app.command(hidden=True)
def answer(secret: Annotated[Path, typer.Option()]) -> None:
    """An inference engine for one model; started by the service as a Ray job."""
    from actors.commands.answer import answer as run_engine

    raise typer.Exit(run_engine(secret))


@app.command(hidden=True)
def validate(
    job: Annotated[str, typer.Option()],
    home: Annotated[Path, typer.Option()],
    score: Annotated[bool, typer.Option("--score")] = False,
) -> None:
    """Check a job's model and data; started by the service as a process of its own. Prints one JSON object."""
    from actors.commands.validate import validate as run_validation

    raise typer.Exit(run_validation(job, home, score=score))


def main() -> None:
    """Entry point: errors a user can mend are one sentence, not a traceback."""
    from modeseek_ray.errors import ModeseekError

    try:
        app()
    except ModeseekError as error:
        typer.secho(f"{error.code}: {error}", fg="red", err=True)
        sys.exit(1)


def _deadlines(given: list[str]) -> dict[str, float]:
    """`SECTION=SECONDS` each. Refuses other sections, and what is no positive number."""
    from actors.journal import SECTIONS

    deadlines_s = {}
    for text in given:
        section, _, seconds = text.partition("=")
        try:
            deadlines_s[section] = float(seconds)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not SECTION=SECONDS.") from None
        if section not in SECTIONS or not 0 < deadlines_s[section] < float("inf"):
            raise typer.BadParameter(f"{text!r}: one of {', '.join(SECTIONS)}, and seconds above 0.")
    return deadlines_s


def _home(directory: Path | None):  # type: ignore[no-untyped-def]
    from modeseek_ray.jobs.paths import Home

    return Home.at(directory) if directory else Home.from_environment()


if __name__ == "__main__":
    main()
