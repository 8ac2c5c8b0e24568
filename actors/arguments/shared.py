"""Arguments of many subcommands.

Heavy packages are imported inside the subcommands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


def home_at(directory: Path | None):  # type: ignore[no-untyped-def]
    from modeseek_ray.jobs.paths import Home

    return Home.at(directory) if directory else Home.from_environment()
