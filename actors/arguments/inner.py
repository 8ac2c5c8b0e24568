"""Processes that the service starts. Hidden: nobody types these."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def drive(
    job: Annotated[str, typer.Option()],
    attempt: Annotated[int, typer.Option()],
    secret: Annotated[Path, typer.Option()],
    home: Annotated[Path, typer.Option()],
) -> None:
    """One attempt at a job; started by the service as a Ray job."""
    from actors.commands.drive import drive as run_attempt

    raise typer.Exit(run_attempt(job, attempt, secret, home))


def answer(secret: Annotated[Path, typer.Option()]) -> None:
    """An inference engine for one model; started by the service as a Ray job."""
    from actors.commands.answer import answer as run_engine

    raise typer.Exit(run_engine(secret))


def validate(
    job: Annotated[str, typer.Option()],
    home: Annotated[Path, typer.Option()],
    score: Annotated[bool, typer.Option("--score")] = False,
) -> None:
    """Check a job's model and data; started by the service as a process of its own. Prints one JSON object."""
    from actors.commands.validate import validate as run_validation

    raise typer.Exit(run_validation(job, home, score=score))
