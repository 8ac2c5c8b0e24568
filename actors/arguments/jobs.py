"""What a user asks of a running service: jobs submitted, watched, stopped; models asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.arguments.shared import DEFAULT_URL, JobFile, JobId, Key, Url


def submit(
    job: JobFile,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and watch it train.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Upload a job's files and submit it. Prints the job's id. With --follow the exit code is 1 unless it succeeds."""
    from actors.commands import remote

    raise typer.Exit(remote.submit(url, api_key, job, follow=follow))


def follow(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Watch a job: step, loss, ESS/n, gamma, retention, tokens per second, time left. Ctrl-C leaves it running."""
    from actors.commands import remote

    raise typer.Exit(remote.follow(url, api_key, job))


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


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    ids: Annotated[bool, typer.Option("--ids", help="Ids alone, one a line: for scripts.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """List jobs, newest first."""
    from actors.commands import remote

    remote.list_jobs(url, api_key, limit, ids_only=ids)


def show(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show a job's state, figures, checkpoints and, if it failed, how to mend it."""
    from actors.commands import remote

    remote.show(url, api_key, job)


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


def cancel(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Cancel a job. Its checkpoints stay."""
    from actors.commands import remote

    remote.cancel(url, api_key, job)


def pause(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Pause a job: it saves a checkpoint and frees its workers. `modeseek resume` goes on exactly there."""
    from actors.commands import remote

    remote.pause(url, api_key, job)


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
