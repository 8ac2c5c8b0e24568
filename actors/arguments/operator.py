"""API keys and tenants, for who runs the service."""

from __future__ import annotations

from typing import Annotated

import typer

from actors.arguments.shared import HomeDir, home_at

keys_app = typer.Typer(
    help="API keys. Until the first is made, anybody on this machine may use the service.",
    no_args_is_help=True,
)
tenants_app = typer.Typer(
    help="Who shares this installation. A tenant comes into being with its first key.", no_args_is_help=True
)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is; for your own list.")],
    tenant: Annotated[str, typer.Option(help="Files and jobs are seen within a tenant only.")] = "default",
    read_only: Annotated[bool, typer.Option("--read-only", help="It may look, and change nothing.")] = False,
    home: HomeDir = None,
) -> None:
    """Make a key and print it, once. A running service knows it at once."""
    from actors.commands import keys

    keys.create(home_at(home), name, tenant, read_only=read_only)


@keys_app.command("list")
def list_keys(home: HomeDir = None) -> None:
    """List keys. The keys themselves are not stored."""
    from actors.commands import keys

    keys.list_keys(home_at(home))


@keys_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="The id that `modeseek keys list` shows.")],
    home: HomeDir = None,
) -> None:
    """Refuse a key from the next request on. After the last one nobody is answered."""
    from actors.commands import keys

    keys.revoke(home_at(home), key)


@keys_app.command("remove-all")
def remove_all_keys(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeDir = None,
) -> None:
    """Need no keys any more: every program of this machine is answered, as before the first key."""
    from actors.commands import keys

    keys.remove_all(home_at(home), confirmed=yes)


@tenants_app.command("list")
def list_tenants(home: HomeDir = None) -> None:
    """List tenants, their limits and how much they keep."""
    from actors.commands import keys

    keys.list_tenants(home_at(home))


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
    keys.limit(home_at(home), tenant, limits)
