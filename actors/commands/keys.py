"""`modeseek keys` and `tenants`: who may use the service, and how much of it.

Acts on the store itself, so no service may be running on SQLite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

import typer
from rich.console import Console
from rich.table import Table

from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import DEFAULT_TENANT
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.serve import only_service


def create(home: Home, name: str, tenant: str = DEFAULT_TENANT, *, read_only: bool = False) -> None:
    """Print the new key on standard output, alone, so that a script can keep it."""
    with _store(home) as store:
        key, _ = store.keys.create(name, tenant_id=tenant, scopes=("read",) if read_only else ("all",))
    typer.echo(key)
    typer.echo("This is the only time it is shown. Set it as MODESEEK_API_KEY.", err=True)


def list_keys(home: Home) -> None:
    """One line a key; the keys themselves are not stored."""
    table = Table("id", "name", "tenant", "scopes", "created", "revoked")
    with _store(home) as store:
        for key in store.keys.all():
            created, revoked = _time(key.created_at), _time(key.revoked_at)
            table.add_row(key.id, key.name, key.tenant_id, ", ".join(key.scopes), created, revoked)
    Console().print(table)


def revoke(home: Home, key_id: str) -> None:
    """The key is refused from now on. Raises `NotFoundError` for one that is not there."""
    with _store(home) as store:
        store.keys.revoke(key_id)


def list_tenants(home: Home) -> None:
    """One line a tenant; an empty cell is no limit of its own."""
    table = Table("tenant", "priority", "jobs at a time", "bytes", "files", "requests a minute")
    with _store(home) as store:
        for tenant in store.tenants.all():
            num_bytes, num_files = store.files.usage(tenant.id)
            table.add_row(
                tenant.id,
                str(tenant.priority),
                _limit(tenant.max_running_jobs),
                f"{num_bytes:,} / {_limit(tenant.max_bytes)}",
                f"{num_files:,} / {_limit(tenant.max_files)}",
                _limit(tenant.requests_per_minute),
            )
    Console().print(table)


def limit(home: Home, tenant: str, limits: Mapping[str, int | None]) -> None:
    """Set those that are given; -1 takes a limit away. Raises `NotFoundError`."""
    given = {name: value for name, value in limits.items() if value is not None}
    values = {name: None if value < 0 and name != "priority" else value for name, value in given.items()}
    with _store(home) as store:
        if values:
            store.tenants.change(tenant, **values)
    list_tenants(home)


def _limit(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


@contextmanager
def _store(home: Home) -> Iterator[Store]:
    """The store with nobody else writing to it: SQLite wants one writer."""
    with only_service(home):
        store = Store(home.store_url)
        try:
            yield store
        finally:
            store.close()


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
