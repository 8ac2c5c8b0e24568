"""`modeseek keys`: who may use the service. Acts on the store itself, so no service may be running on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import typer
from rich.console import Console
from rich.table import Table

from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import DEFAULT_TENANT
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.serve import only_service


def create(home: Home, name: str, tenant: str = DEFAULT_TENANT) -> None:
    """Print the new key on standard output, alone, so that a script can keep it."""
    with _store(home) as store:
        key, _ = store.keys.create(name, tenant_id=tenant)
    typer.echo(key)
    typer.echo("This is the only time it is shown. Set it as MODESEEK_API_KEY.", err=True)


def list_keys(home: Home) -> None:
    """One line a key; the keys themselves are not stored."""
    table = Table("id", "name", "tenant", "created", "revoked")
    with _store(home) as store:
        for key in store.keys.all():
            table.add_row(key.id, key.name, key.tenant_id, _time(key.created_at), _time(key.revoked_at))
    Console().print(table)


def revoke(home: Home, key_id: str) -> None:
    """The key is refused from now on. Raises `NotFoundError` for one that is not there."""
    with _store(home) as store:
        store.keys.revoke(key_id)


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
