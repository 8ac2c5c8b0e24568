"""Starting the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.arguments.shared import HomeDir, home_at


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
        host=host, port=port, home=home_at(home).root, ray_address=ray_address, ray_cpus=ray_cpus,
        max_running_jobs=max_running_jobs, roots=tuple(root or ()), pause_grace_s=pause_grace,
        requests_per_minute=requests_per_minute, webhook_networks=tuple(webhook_network or ()),
        log_format="json" if json_logs else "text", autoscaling=autoscaling,
        lease_s=lease, deadlines_s=_deadlines(deadline) if deadline else {},
    )  # fmt: skip
    run_service(options)


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
