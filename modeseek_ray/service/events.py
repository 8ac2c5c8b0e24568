"""`GET /v1/fine_tuning/jobs/{id}/events`: pages, newest first, or a stream that loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from modeseek_ray.jobs.records import event_sequence
from modeseek_ray.service.context import CallerDep, Service, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.service.wire import EventObject, Page, event_object

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"], responses=ERROR_RESPONSES)

_RETRY_MS = 1000


@router.get(
    "/{job_id}/events",
    response_model=Page[EventObject],
    openapi_extra={"responses": {"200": {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}},
)
async def list_events(
    job_id: str,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header(max_length=128)] = None,
) -> Response | Page[EventObject]:
    """A page, newest first; with `stream=true` or `Accept: text/event-stream` all, in order, as they come.

    A stream begins behind `Last-Event-ID` (or `after`), and ends with `[DONE]` when the job has.
    """
    await run_in_threadpool(service.store.jobs.get, job_id, caller.tenant_id)
    if stream or "text/event-stream" in request.headers.get("accept", ""):
        start = _sequence(job_id, last_event_id or after)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            _stream(service, job_id, start or 0), media_type="text/event-stream", headers=headers
        )
    before = _sequence(job_id, after)
    page = await run_in_threadpool(service.store.events.page, job_id, before=before, limit=limit)
    data = [event_object(event) for event in page.data]
    return Page(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


async def _stream(service: Service, job_id: str, sequence: int) -> AsyncIterator[bytes]:
    """Everything after event number `sequence`. Listening begins before reading, so nothing slips by."""
    yield format_sse_event(retry=_RETRY_MS)
    with service.notifier.listen(job_id) as changed:
        while True:
            changed.clear()
            bulletin = await service.bulletins.after(job_id, sequence)
            if bulletin.text:
                yield bulletin.text
            sequence = bulletin.sequence
            if bulletin.is_over:
                yield format_sse_event(data_str="[DONE]")
                return
            if not bulletin.is_full and not await _changed(changed, service):
                yield KEEPALIVE_COMMENT


async def _changed(changed: asyncio.Event, service: Service) -> bool:
    """Wait for a change; False when it is time for a sign of life.

    Of what another service writes into a shared store nobody tells us: look every second.
    """
    alone = not service.store.database.is_shared
    timeout_s = service.settings.sse_keepalive_s if alone else min(1.0, service.settings.sse_keepalive_s)
    with suppress(TimeoutError):
        return await asyncio.wait_for(changed.wait(), timeout_s)
    return False


def _sequence(job_id: str, event_id: str | None) -> int | None:
    if event_id is None:
        return None
    sequence = event_sequence(job_id, event_id)
    if sequence is None:
        raise RequestError(
            f"{event_id!r} is not an event of this job.",
            param="after",
            mend="Give the id of an event you were sent.",
        )
    return sequence
