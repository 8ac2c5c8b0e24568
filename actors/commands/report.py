"""`modeseek report`: the HTML page of one job, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from actors.cli.tables import comparison
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.reports import summarize, write_comparison, write_report
from modeseek_ray.reports.results import read_job


def report(jobs: Sequence[str], out: Path | None, home: Home) -> None:
    """Write the page and print where it is; of several jobs, a table as well.

    Raises `ConfigError` for a job without results here.
    """
    directories = [results_of(job, home) for job in jobs]
    if len(directories) == 1:
        target = out or directories[0] / "report.html"
        write_report(directories[0], target, _training_file(directories[0], home))
    else:
        target = out or directories[0] / "comparison.html"
        write_comparison(directories, target)
        # The path alone goes to stdout.
        Console(stderr=True).print(comparison([summarize(directory) for directory in directories]))
    typer.echo(target)


def _training_file(results: Path, home: Home) -> Path | None:
    """Where the rows' texts can be looked up, if the file is still there."""
    name = str(read_job(results).config.get("training_file", ""))
    path = home.file(name) if name.startswith("file-") else Path(name)
    return path if path.is_file() else None


def results_of(job: str, home: Home) -> Path:
    """The result directory a job id or a path stands for."""
    as_path = Path(job).expanduser()
    candidates = [as_path, as_path / "results"]
    if "/" not in job:
        candidates.append(home.results(job))
    for directory in candidates:
        if (directory / "job.json").is_file():
            return directory
    raise ConfigError(
        f"there are no results of {job!r} on this machine.",
        mend="Give a job id of this MODESEEK_HOME, or a directory written by `modeseek run`.",
    )
