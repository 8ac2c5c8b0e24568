"""`GET /v1/fine_tuning/jobs/{id}/logs`: what a job's drivers printed, for `modeseek logs`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, Response

from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.service.context import CallerDep, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"], responses=ERROR_RESPONSES)


@router.get(
    "/{job_id}/logs",
    # Not PlainTextResponse: the document would then promise errors in plain text, too.
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def job_logs(
    job_id: str,
    service: ServiceDep,
    caller: CallerDep,
    attempt: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> PlainTextResponse:
    """The log of one attempt's driver, the newest where none is named."""
    job = await run_in_threadpool(service.store.jobs.get, job_id, caller.tenant_id)
    number = attempt or job.attempt
    text = None if service.reconciler is None else await service.reconciler.logs(job.id, number)
    if text is None:
        raise NotFoundError(
            f"there is no log of attempt {number}.",
            code="log_not_found",
            mend="A job has one as soon as its driver runs; Ray forgets it when its head is restarted.",
        )
    return PlainTextResponse(text)
