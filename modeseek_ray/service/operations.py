"""For operators and browsers: health, metrics, and a page that lists the jobs."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from modeseek_ray import __version__
from modeseek_ray.jobs.errors import TokenError
from modeseek_ray.service.context import ServiceDep, get_caller
from modeseek_ray.service.metrics import CONTENT_TYPE
from modeseek_ray.service.wire import JobObject, job_object

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz")
def readyz(service: ServiceDep) -> JSONResponse:
    """The store can be written, and there is a cluster to run jobs on."""
    service.store.check_writable()
    runs_jobs = service.reconciler is not None and service.reconciler.runs_jobs
    body: dict[str, Any] = {"status": "ok", "runs_jobs": runs_jobs}
    return JSONResponse(body)


@router.get("/metrics", response_class=Response)
def metrics(service: ServiceDep) -> Response:
    """Figures for Prometheus: sums over all jobs."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
def page(request: Request, service: ServiceDep) -> HTMLResponse:
    """The newest jobs, read once. Browsers send no key, so with keys set nothing is listed."""
    jobs: list[JobObject] | None = None
    try:
        caller = get_caller(request, service, request.headers.get("authorization"), None)
        now = service.store.database.clock()
        records = service.store.jobs.page(tenant_id=caller.tenant_id, limit=50).data
        jobs = [job_object(job, service.store.jobs.queue_position(job), now) for job in records]
    except TokenError:
        pass
    html = _template().render(jobs=jobs, version=__version__)
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse(html, headers=headers)


@cache
def _template() -> jinja2.Template:
    text = files("modeseek_ray.service").joinpath("page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
