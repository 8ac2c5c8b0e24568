"""`modeseek keys` and `tenants`: who may use the service, and how much of it.

Keys change while the service runs: then it is asked to, as SQLite has one writer. Limits of tenants are
set in the store itself, with no service running on SQLite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Protocol

import typer
from rich.console import Console
from rich.table import Table

from modeseek_ray.client import OperatorClient
from modeseek_ray.errors import StorageError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import DEFAULT_TENANT, KeyRecord
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.serve import only_service


class Keys(Protocol):
    """A `KeyStore`, or what stands for the one of a running service."""

    def create(
        self, name: str, *, tenant_id: str = ..., scopes: tuple[str, ...] = ...
    ) -> tuple[str, KeyRecord]: ...

    def all(self) -> list[KeyRecord]: ...

    def revoke(self, key_id: str) -> None: ...

    def remove_all(self) -> int: ...


def create(home: Home, name: str, tenant: str = DEFAULT_TENANT, *, read_only: bool = False) -> None:
    """Print the new key on standard output, alone, so that a script can keep it."""
    with _keys(home) as keys:
        key, _ = keys.create(name, tenant_id=tenant, scopes=("read",) if read_only else ("all",))
    typer.echo(key)
    typer.echo("This is the only time it is shown. Set it as MODESEEK_API_KEY.", err=True)


def list_keys(home: Home) -> None:
    """One line a key; the keys themselves are not stored."""
    table = Table("id", "name", "tenant", "scopes", "created", "revoked")
    with _keys(home) as keys:
        for key in keys.all():
            created, revoked = _time(key.created_at), _time(key.revoked_at)
            table.add_row(key.id, key.name, key.tenant_id, ", ".join(key.scopes), created, revoked)
    Console().print(table)


def revoke(home: Home, key_id: str) -> None:
    """The key is refused from the next request on. Raises `key_not_found` for one that is not there."""
    with _keys(home) as keys:
        keys.revoke(key_id)
        left = [key for key in keys.all() if key.revoked_at is None]
    if not left:
        typer.echo(
            "That was the last key: nobody is answered now. `modeseek keys create NAME` makes another;"
            " `modeseek keys remove-all` lets this machine's programs in without one.",
            err=True,
        )


def remove_all(home: Home, *, confirmed: bool) -> None:
    """Back to a service without keys, for a machine of one's own. Asks first."""
    typer.echo(
        "Without keys the service answers EVERY program and user of its machine, and whoever a proxy on it"
        " lets through. Each may read, change and delete everything of the tenant `default`.",
        err=True,
    )
    if not confirmed:
        typer.confirm("Remove all keys?", abort=True, err=True)
    with _keys(home) as keys:
        typer.echo(f"{keys.remove_all()} keys removed: NO KEY IS NEEDED ANY MORE.", err=True)


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
def _keys(home: Home) -> Iterator[Keys]:
    """The store's keys where nobody else writes to it, else those of the service that does."""
    with ExitStack() as stack:
        try:
            store = stack.enter_context(_store(home))
        except StorageError as error:
            if error.code != "home_in_use":
                raise
            store = None
        yield _KeysOfService(OperatorClient(home.operator)) if store is None else store.keys


class _KeysOfService:
    """`Keys`, by asking."""

    def __init__(self, client: OperatorClient) -> None:
        self._client = client

    def create(
        self, name: str, *, tenant_id: str = DEFAULT_TENANT, scopes: tuple[str, ...] = ("all",)
    ) -> tuple[str, KeyRecord]:
        made = self._client.create_key(name, tenant_id, scopes)
        return made["key"], KeyRecord(**made["record"])

    def all(self) -> list[KeyRecord]:
        return [KeyRecord(**record) for record in self._client.list_keys()]

    def revoke(self, key_id: str) -> None:
        self._client.revoke_key(key_id)

    def remove_all(self) -> int:
        return self._client.remove_all_keys()


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
