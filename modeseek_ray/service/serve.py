"""Run the application on a port of this machine."""

from __future__ import annotations

import fcntl
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from modeseek_ray.errors import ServiceError, StorageError
from modeseek_ray.jobs.paths import Home, write_private
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.context import is_loopback

# Open event streams would keep the process alive; their clients reconnect and lose nothing.
_GRACE_S = 2


def run_service(app: FastAPI, host: str = "127.0.0.1", port: int = 8420) -> None:
    """Serve until SIGINT or SIGTERM. Raises `ServiceError` when the port is taken."""
    server = make_server(app, host, port)
    with listen(host, port) as listener:
        announce(app, host, port)
        server.run(sockets=[listener])


def make_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8420) -> uvicorn.Server:
    """A server that has not been started, for callers with an event loop of their own."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=65,  # longer than clients' pools keep idle connections
        ws="none",
    )
    return uvicorn.Server(config)


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before anything is started, so that a taken one is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"cannot listen on {host}:{port}: {error.strerror}.",
                mend="Is `modeseek serve` running already? Choose another port with --port.",
                code="port_taken",
            ) from None
        yield listener


@contextmanager
def only_service(home: Home) -> Iterator[None]:
    """Hold `home` for this process: two services would write one SQLite store. Raises `StorageError`.

    A PostgreSQL store may be written by several services; their homes must show the same files.
    What a service that was killed had announced goes first: its token is good for nothing any more.
    """
    home.prepare()
    if not home.store_url.startswith("sqlite:"):
        yield
        return
    with home.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                "another service uses this directory.",
                file=str(home.root),
                mend="Stop it first, or give this one a MODESEEK_HOME of its own.",
                code="home_in_use",
            ) from None
        home.operator.unlink(missing_ok=True)
        try:
            yield
        finally:
            home.operator.unlink(missing_ok=True)


def announce(app: FastAPI, host: str, port: int) -> None:
    """Write down how commands of this home reach the service, which alone may write an SQLite store.

    Call it inside `only_service`, which takes it back. With PostgreSQL commands write for themselves.
    """
    service = app.state.service
    if service.store.database.is_shared:
        return
    name = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    write_private(service.home.operator, json.dumps({"url": url, "token": service.operator_token}))


def check_exposure(store: Store, host: str) -> None:
    """Refuse to listen beyond this machine while anybody could use the service."""
    if not is_loopback(host) and not store.keys.required():
        raise ServiceError(
            f"listening on {host} without API keys would let anybody in.",
            mend="Create a key first, and put TLS in front.",
            code="keys_needed",
        )
