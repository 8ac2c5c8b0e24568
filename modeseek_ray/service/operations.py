"""For operators: health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from modeseek_ray import __version__
from modeseek_ray.service.context import ServiceDep
from modeseek_ray.service.metrics import CONTENT_TYPE

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
