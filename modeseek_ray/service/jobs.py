"""`/v1/fine_tuning/jobs`: create, validate, list, read, cancel, checkpoints, ledger, report."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet
from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import ValidationError

from modeseek_ray.client import finite
from modeseek_ray.config import JobConfig, config_error
from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.errors import InFlightError, NotFoundError
from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.jobs.look import ROWS, LookRequest
from modeseek_ray.jobs.records import JobRecord, new_id
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.reports.distribution import read_distribution
from modeseek_ray.reports.rows import ledger_page, steering_of
from modeseek_ray.service.body import read_json, read_optional_json
from modeseek_ray.service.context import Caller, CallerDep, Service, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.service.resumption import resume
from modeseek_ray.service.submission import accept, check
from modeseek_ray.service.validations import PREFIX, validation_of
from modeseek_ray.service.wire import (
    CheckpointObject,
    JobError,
    JobObject,
    Page,
    Resumption,
    Validation,
    ValidationObject,
    checkpoint_object,
    job_object,
)

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"], responses=ERROR_RESPONSES)

_METADATA = re.compile(r"metadata\[([^\[\]\"\\]{1,64})\]")
_RESUME_BODY = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": Resumption.model_json_schema()}},
    }
}
_JOB_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": JobConfig.model_json_schema()}},
    }
}


@router.post("", openapi_extra=_JOB_BODY)
async def create_job(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
) -> JobObject:
    """Create a job. It is stored before this answers; the same Idempotency-Key never makes two."""
    body = await read_json(request, service.settings.max_body_bytes)
    capacity = await service.capacity()
    with _sole(service, caller, idempotency_key):
        return await run_in_threadpool(_create, service, caller, body, idempotency_key, capacity)


@router.post("/validate", openapi_extra=_JOB_BODY)
async def validate_job(
    request: Request,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    score: Annotated[bool, Query()] = False,
    preset: Annotated[list[str] | None, Query(max_length=32)] = None,
    rows: Annotated[int, Query(ge=0, le=10_000_000)] = ROWS,
) -> Validation | ValidationObject:
    """Check all that a submission checks, tokens included, and start nothing.

    With `score`, rows are scored under the start as well, to see what weightings would make of them.
    That takes a while: what is wrong already is said at once, else the answer is 202 and where to ask.
    `preset` (may be repeated) says which to show beside the job's own weighting, `rows` how many rows
    to score at most; 0 = all.
    """
    body = await read_json(request, service.settings.max_body_bytes)
    job_id = new_id(PREFIX)
    directory = service.home.job(job_id)
    handed_over = False
    try:
        if score and service.validations is not None:
            service.validations.refuse_crowds(caller.tenant_id)
        look = LookRequest.of(preset or [], rows)
        checked = await run_in_threadpool(check, service, caller, body, await service.capacity())
        if service.validator is None:
            return Validation(valid=True)
        await run_in_threadpool(checked.spec(service, job_id).write, service.home.config(job_id))
        if score and service.validations is not None:
            await run_in_threadpool(look.write, service.home.look(job_id))
            started = service.validations.start(job_id, caller.tenant_id)
            handed_over = True
            response.status_code = 202
            return started
        outcome = await service.validator.validate(job_id)
    except ModeseekError as error:
        if error.http_status >= 500:
            raise
        problem = JobError(code=error.code, message=str(error), param=error.param)
        return Validation(valid=False, error=problem)
    finally:
        if not handed_over:
            await run_in_threadpool(shutil.rmtree, directory, ignore_errors=True)
    return validation_of(outcome)


@router.get("")
def list_jobs(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[JobObject]:
    """List jobs, newest first; `metadata[key]=value` keeps those that have it."""
    page = service.store.jobs.page(
        tenant_id=caller.tenant_id, after=after, limit=limit, metadata=_metadata_filter(request)
    )
    places = service.store.queue.places(service.slots)
    now = service.store.database.clock()
    return Page(
        data=[job_object(job, places.get(job.id), now) for job in page.data],
        has_more=page.has_more,
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
    )


@router.get("/{job_id}")
def retrieve_job(job_id: str, service: ServiceDep, caller: CallerDep) -> JobObject:
    """A job as it is now."""
    return _shown(service, service.store.jobs.get(job_id, caller.tenant_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, service: ServiceDep, caller: CallerDep) -> JobObject:
    """Cancel a job: at once where nothing runs for it, else within 15 seconds. Checkpoints stay."""
    job = service.store.jobs.cancel(job_id, caller.tenant_id)
    service.wake()
    return _shown(service, job)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, service: ServiceDep, caller: CallerDep) -> JobObject:
    """Pause a job: a running one finishes its step, saves a checkpoint and frees all its workers."""
    job = service.store.jobs.pause(job_id, caller.tenant_id)
    service.wake()
    return _shown(service, job)


@router.post("/{job_id}/resume", openapi_extra=_RESUME_BODY)
async def resume_job(job_id: str, request: Request, service: ServiceDep, caller: CallerDep) -> JobObject:
    """Let a paused job go on, exactly where it was; with another number of trainers if the body says so.

    A failed job never changes: a new job, which is answered, goes on from its last checkpoint
    (`resumed_from`). Asked again, the same one is answered while it lives.
    """
    body = await read_optional_json(request, service.settings.max_body_bytes)
    try:
        changes = Resumption.model_validate(body)
    except ValidationError as error:
        raise config_error(error, model=Resumption) from None
    job = await run_in_threadpool(resume, service, caller, job_id, await service.capacity(), changes)
    service.wake()
    return await run_in_threadpool(_shown, service, job)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    service: ServiceDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Page[CheckpointObject]:
    """Committed checkpoints, newest first."""
    service.store.jobs.get(job_id, caller.tenant_id)
    page = service.store.jobs.checkpoints(job_id, after=after, limit=limit)
    return Page(
        data=[checkpoint_object(record) for record in page.data],
        has_more=page.has_more,
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
    )


@router.get("/{job_id}/weights", response_class=Response)
def job_weights(
    job_id: str,
    service: ServiceDep,
    caller: CallerDep,
    format: Literal["parquet", "json"] = "parquet",
    view: Literal["steps", "ledger"] = "steps",
    after: Annotated[int, Query(ge=0, le=2**40)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """What each sample counted in each step: the Parquet file, or rows `after` to `after + limit` as JSON.

    `view=ledger` (JSON) sums over the steps: a line per row of the training file, with its text, and
    the lists "collect more like these" and "sample less of these".
    """
    job = service.store.jobs.get(job_id, caller.tenant_id)
    if view == "ledger" and format != "json":
        raise RequestError("the ledger is not in Parquet.", param="format", mend="Ask for format=json.")
    path = service.home.weights_parquet(job_id)
    if not path.is_file():
        raise NotFoundError(
            "there are no weights yet.", code="weights_not_ready", mend="They are written when training ends."
        )
    if format == "parquet":
        return FileResponse(
            path, filename=f"{job_id}-weights.parquet", media_type="application/vnd.apache.parquet"
        )
    if view == "ledger":
        ledger = read_distribution(path.parent)[1]
        texts = JobSpec.read(service.home.config(job_id)).files["training_file"]
        steering = steering_of(job.config)
        return JSONResponse(ledger_page(ledger, texts, steering, after=after, limit=limit))
    return JSONResponse(_steps_page(path, after, limit))


@router.get("/{job_id}/report", response_class=FileResponse)
def job_report(job_id: str, service: ServiceDep, caller: CallerDep) -> FileResponse:
    """The job's self-contained HTML report."""
    service.store.jobs.get(job_id, caller.tenant_id)
    path = service.home.report_html(job_id)
    if not path.is_file():
        raise NotFoundError(
            "there is no report yet.", code="report_not_ready", mend="It is written when training ends."
        )
    return FileResponse(path, media_type="text/html; charset=utf-8")


@contextmanager
def _sole(service: Service, caller: Caller, key: str | None) -> Iterator[None]:
    """Of two requests with one key at the same time the later is told to come again.

    For the user's sake: that they make one job is the store's business, also across services.
    """
    mark = (caller.tenant_id, key or "")
    if key is None:
        yield
        return
    if mark in service.in_flight:
        raise InFlightError("a request with this Idempotency-Key is being worked on.", mend="Try again.")
    service.in_flight.add(mark)
    try:
        yield
    finally:
        service.in_flight.discard(mark)


def _create(
    service: Service, caller: Caller, body: Any, key: str | None, capacity: Capacity | None
) -> JobObject:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=True).encode()
    body_sha256 = hashlib.sha256(canonical).hexdigest()
    if key is not None:
        known = service.store.jobs.find_idempotent(caller.tenant_id, key, body_sha256)
        if known is not None:
            return _shown(service, known)
    checked = check(service, caller, body, capacity)
    job = accept(service, caller, body, checked, idempotency_key=key, body_sha256=body_sha256)
    return _shown(service, job)


def _shown(service: Service, job: JobRecord) -> JobObject:
    places = service.store.queue.places(service.slots) if job.state == "queued" else {}
    return job_object(job, places.get(job.id), service.store.database.clock())


def _metadata_filter(request: Request) -> dict[str, str]:
    found = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata["):
            matched = _METADATA.fullmatch(name)
            if matched is None:
                raise RequestError(
                    f"{name[:80]!r} is not a metadata filter.",
                    param="metadata",
                    mend="Write metadata[key]=value.",
                )
            found[matched.group(1)] = value
    return found


def _steps_page(path: Path, after: int, limit: int) -> dict[str, Any]:
    """Rows by position, reading only the row groups they are in."""
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetFile(path) as file:
        total = file.metadata.num_rows
        start = 0
        for i in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(i).num_rows
            if stop > after and start < after + limit:
                table = file.read_row_group(i)
                first = max(after - start, 0)
                rows += table.slice(first, min(after + limit, stop) - start - first).to_pylist()
            start = stop
    return {"object": "list", "data": finite(rows), "has_more": after + limit < total, "total": total}
