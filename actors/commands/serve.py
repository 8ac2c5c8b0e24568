"""`modeseek serve`: the store, Ray's head, the reconciler and the API, in the order they need each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fastapi import FastAPI
from rich.console import Console

from actors.head_keeper import HeadKeeper
from actors.network import url_for_drivers
from modeseek_ray.jobs.engine_keeper import EngineKeeper, EngineSettings
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.states import ATTENDED
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.structured_logs import configure
from modeseek_ray.jobs.validation import ProcessValidator
from modeseek_ray.service import ServiceSettings, create_app
from modeseek_ray.service.deliveries import parse_networks
from modeseek_ray.service.serve import announce, check_exposure, listen, make_server, only_service

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What `modeseek serve` was asked for."""

    host: str
    port: int
    home: Path
    ray_address: str | None
    ray_cpus: int | None
    max_running_jobs: int
    roots: tuple[Path, ...]
    pause_grace_s: float = 300.0
    lease_s: float = 60.0
    deadlines_s: Mapping[str, float] = field(default_factory=dict)
    requests_per_minute: int | None = None
    webhook_networks: tuple[str, ...] = ()
    autoscaling: bool = False
    log_format: Literal["text", "json"] = "text"


def serve(options: ServeOptions) -> None:
    """Serve until interrupted. A port or a home in use, or missing keys, are said before Ray is started."""
    home = Home.at(options.home)
    console = Console(stderr=True, highlight=False)
    configure(options.log_format, logging.WARNING if options.log_format == "text" else logging.INFO)
    parse_networks(options.webhook_networks)
    EngineSettings.from_environment()  # refused now, not after Ray has started
    cluster = None if options.ray_address is None else urlsplit(options.ray_address).hostname
    advertised = url_for_drivers(
        options.host, options.port, cluster, os.environ.get("MODESEEK_ADVERTISE_URL")
    )
    with only_service(home), listen(options.host, options.port) as listener:
        store = Store(home.store_url, lease_s=options.lease_s)
        check_exposure(store, options.host)
        head: HeadKeeper | None = None
        try:
            with _ray(options, home, console) as head:
                app = _application(options, home, store, head, advertised)
                announce(app, options.host, options.port)
                url = f"http://{options.host}:{options.port}"
                console.print(f"Serving at {url} (documentation: {url}/docs). Ctrl-C ends it.")
                make_server(app, options.host, options.port).run(sockets=[listener])
        finally:  # Ctrl-C comes as an exception
            if (
                head is not None and not store.database.is_shared
            ):  # else jobs may run on another service's head
                end_attempts(store, home)
            store.close()


def _application(
    options: ServeOptions, home: Home, store: Store, head: HeadKeeper | None, advertised: str
) -> FastAPI:
    """The API with its reconciler. `advertised` is the URL by which drivers report."""
    # Imported here: it takes seconds, and what `serve` checks before should answer at once.
    from actors.ray_jobs import RayJobsLauncher

    validator = ProcessValidator(home)
    dashboard = options.ray_address if head is None else head.dashboard
    launcher = RayJobsLauncher(str(dashboard), home.storage, autoscaling=options.autoscaling)
    if head is not None:
        head.on_move(launcher.move)
    engine_settings = EngineSettings.from_environment()
    reconciler = Reconciler(
        store,
        home,
        launcher,
        validator,
        url=advertised,
        settings=ReconcilerSettings(
            max_running_jobs=options.max_running_jobs,
            pause_grace_s=options.pause_grace_s,
            deadlines_s=options.deadlines_s,
        ),
        engines=EngineKeeper(store, home, launcher, url=advertised, settings=engine_settings),
    )
    return create_app(
        home,
        store,
        reconciler=reconciler,
        validator=validator,
        settings=ServiceSettings(
            roots=tuple(root.resolve() for root in options.roots),
            requests_per_minute=options.requests_per_minute,
            webhook_networks=options.webhook_networks,
        ),
    )


def end_attempts(store: Store, home: Home) -> None:
    """No driver has outlived the head that was ended: at the next start no job waits for a lease to run out."""
    for job in store.jobs.in_states(*ATTENDED - {"cancelling"}):
        spool = home.spool(job.id, job.attempt)
        try:
            store.attempts.lose(job, "the service was ended, and Ray with it.", spool, counts=False)
        except Exception:  # then it is the lease that says so
            log.exception("the attempt of %s is left as it is", job.id)


@contextmanager
def _ray(options: ServeOptions, home: Home, console: Console) -> Iterator[HeadKeeper | None]:
    """A head of our own, which is ended with the service; None where a foreign one is used."""
    if options.ray_address is not None:
        yield None
        return
    console.print("Starting Ray …")
    # Logical CPUs: two cores hold more small workers than that, only slower.
    num_cpus = options.ray_cpus or max(8, os.cpu_count() or 1)
    with HeadKeeper(home.root / "ray", num_cpus) as keeper:
        console.print(f"Ray {'was running' if keeper.adopted else 'is up'} ({num_cpus} logical CPUs).")
        try:
            yield keeper
        finally:
            console.print("Stopping Ray …")
