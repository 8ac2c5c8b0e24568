"""The `modeseek` command: composition root, the only file that knows everybody.

What a subcommand takes lives in `actors/arguments`, what it does in `actors/commands`, how that looks in
`actors/cli`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from actors.arguments import alone, inner, jobs, operator, service

app = typer.Typer(
    name="modeseek",
    help="Fine-tuning that decides how much each sample counts. Begin with `modeseek demo`, or with"
    " `modeseek serve` in one terminal and `modeseek submit job.yaml --follow` in another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

# In the order of `--help`.
COMMANDS: dict[str, Callable[..., None]] = {
    "serve": service.serve,
    "submit": jobs.submit,
    "follow": jobs.follow,
    "ask": jobs.ask,
    "list": jobs.list_jobs,
    "show": jobs.show,
    "logs": jobs.logs,
    "cancel": jobs.cancel,
    "pause": jobs.pause,
    "resume": jobs.resume,
    "check": alone.check,
    "run": alone.run,
    "report": alone.report,
    "doctor": alone.doctor,
    "playground": alone.playground,
    "presets": alone.presets,
    "rerank": alone.rerank,
    "demo": alone.demo,
}
HIDDEN: dict[str, Callable[..., None]] = {
    "drive": inner.drive,
    "answer": inner.answer,
    "validate": inner.validate,
}

for name, command in COMMANDS.items():
    app.command(name)(command)
for name, command in HIDDEN.items():
    app.command(name, hidden=True)(command)
app.add_typer(operator.keys_app, name="keys")
app.add_typer(operator.tenants_app, name="tenants")


def main() -> None:
    """Entry point: errors a user can mend are one sentence, not a traceback."""
    from modeseek_ray.errors import ModeseekError

    try:
        app()
    except ModeseekError as error:
        typer.secho(f"{error.code}: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
