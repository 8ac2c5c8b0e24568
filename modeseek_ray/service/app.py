"""The application: routes, errors, and the background task that moves jobs on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from modeseek_ray import __version__
from modeseek_ray.jobs.launcher import Validator
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.reconciler import Reconciler
from modeseek_ray.jobs.store import Store
from modeseek_ray.service import (
    completions,
    drivers,
    engines,
    errors,
    events,
    files,
    graders,
    jobs,
    logs,
    models,
    operations,
    operator,
    page,
    validations,
    webhooks,
)
from modeseek_ray.service.bulletin import Bulletins
from modeseek_ray.service.context import Service
from modeseek_ray.service.deliveries import Deliveries
from modeseek_ray.service.limits import Limits
from modeseek_ray.service.links import add_links
from modeseek_ray.service.metrics import Metrics
from modeseek_ray.service.middleware import RequestIds
from modeseek_ray.service.notify import Notifier
from modeseek_ray.service.settings import ServiceSettings

log = logging.getLogger(__name__)


def create_app(
    home: Home,
    store: Store,
    *,
    reconciler: Reconciler | None = None,
    validator: Validator | None = None,
    settings: ServiceSettings | None = None,
) -> FastAPI:
    """One service. Without a reconciler jobs are accepted and stay so; without a validator
    `/validate` checks what needs no tokenizer.
    """
    home.prepare()
    notifier = Notifier()
    store.database.listeners.append(notifier.notify)
    metrics = Metrics(store, notifier)
    settings = settings or ServiceSettings()
    service = Service(
        home=home,
        store=store,
        settings=settings,
        notifier=notifier,
        metrics=metrics,
        bulletins=Bulletins(store.events, notifier),
        limits=Limits(partial(_per_minute, store, settings), settings.max_open_requests),
        reconciler=reconciler,
        validator=validator,
        validations=None if validator is None else validations.Validations(home, validator),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        _remove_drafts(home)
        if service.validations is not None:
            service.validations.resume()
        tasks = [asyncio.create_task(Deliveries(store, settings.webhook_networks).run())]
        if reconciler is not None:
            tasks.append(asyncio.create_task(reconciler.run()))
        try:
            yield
        finally:
            if service.validations is not None:
                await service.validations.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(
        title="modeseek-ray",
        version=__version__,
        description="Fine-tuning that decides how much each sample counts. OpenAI's clients work here.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages take scripts from another host; ours is in `page`
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    app.add_middleware(RequestIds, metrics=metrics)
    # `events` first: its path is under a job's, and the routes of a job take what is left.
    for module in (
        files,
        events,
        jobs,
        graders,
        logs,
        validations,
        models,
        completions,
        webhooks,
        drivers,
        engines,
        operator,
        operations,
        page,
    ):
        app.include_router(module.router)
    plain = app.openapi
    app.openapi = lambda: add_links(plain())  # type: ignore[method-assign]
    return app


def _per_minute(store: Store, settings: ServiceSettings, tenant_id: str) -> int | None:
    own = store.tenants.get(tenant_id).requests_per_minute
    return settings.requests_per_minute if own is None else own


def _remove_drafts(home: Home) -> None:
    """Uploads that a crash cut off."""
    for draft in home.files.glob(".*.upload"):
        draft.unlink(missing_ok=True)
