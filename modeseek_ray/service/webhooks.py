"""`/v1/webhook_endpoints`: where to be told that a job has ended, as OpenAI's clients manage them."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, TypeVar

import httpx
from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field, ValidationError

from modeseek_ray.config import config_error
from modeseek_ray.jobs.records import new_id
from modeseek_ray.jobs.webhook_store import EVENT_TYPES, DeliveryRecord, EndpointRecord, event_body
from modeseek_ray.service.body import read_json
from modeseek_ray.service.context import CallerDep, Service, ServiceDep
from modeseek_ray.service.deliveries import WebhookError, check_url, parse_networks, resolve, send
from modeseek_ray.service.errors import ERROR_RESPONSES
from modeseek_ray.service.wire import Page
from modeseek_ray.strict import Strict

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=ERROR_RESPONSES)

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=len(EVENT_TYPES))]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Url = Annotated[str, Field(min_length=1, max_length=2048)]
Body = TypeVar("Body", bound=Strict)


class NewEndpoint(Strict):
    """Where to send which events."""

    name: Name
    url: Url
    event_types: EventTypes


class ChangedEndpoint(Strict):
    """What is left away stays."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None


class Rotation(Strict):
    """A new signing secret."""

    keep_old_secret_active_for_24_hours: bool = False


class Trial(Strict):
    """A sample event to send now."""

    event_type: EventType


class WebhookEndpoint(BaseModel):
    """An endpoint. Its secret is shown once."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str


class WebhookEndpointWithSecret(WebhookEndpoint):
    """The only time the secret can be read."""

    signing_secret: str


class DeletedWebhookEndpoint(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookTrialResult(BaseModel):
    """What the endpoint answered to a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookEventTypes(BaseModel):
    """The kinds of events that endpoints may ask for."""

    object: Literal["list"] = "list"
    data: list[str]


def _body(model: type[Strict]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("/webhook_endpoints", openapi_extra=_body(NewEndpoint))
async def create_webhook_endpoint(
    request: Request, service: ServiceDep, caller: CallerDep
) -> WebhookEndpointWithSecret:
    """Be told when jobs end. Keep the secret: events are signed with it."""
    new = await _read(request, service, NewEndpoint)
    await _check(service, new.url)
    record = await run_in_threadpool(
        service.store.webhooks.create, caller.tenant_id, new.name, new.url, _unique(new.event_types)
    )
    return _with_secret(record)


@router.get("/webhook_endpoints")
def list_webhook_endpoints(
    service: ServiceDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[WebhookEndpoint]:
    """List endpoints, newest first."""
    page = service.store.webhooks.page(caller.tenant_id, after=after, limit=limit)
    data = [_object(record) for record in page.data]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return Page(data=data, has_more=page.has_more, first_id=first, last_id=last)


@router.get("/webhook_endpoints/{endpoint_id}")
def retrieve_webhook_endpoint(endpoint_id: str, service: ServiceDep, caller: CallerDep) -> WebhookEndpoint:
    """One endpoint, without its secret."""
    return _object(service.store.webhooks.get(endpoint_id, caller.tenant_id))


@router.post("/webhook_endpoints/{endpoint_id}", openapi_extra=_body(ChangedEndpoint))
async def update_webhook_endpoint(
    endpoint_id: str, request: Request, service: ServiceDep, caller: CallerDep
) -> WebhookEndpoint:
    """Change an endpoint's name, URL or event types."""
    await run_in_threadpool(service.store.webhooks.get, endpoint_id, caller.tenant_id)
    changed = await _read(request, service, ChangedEndpoint)
    if changed.url is not None:
        await _check(service, changed.url)
    values = changed.model_dump(exclude_none=True)
    if changed.event_types is not None:
        values["event_types"] = _unique(changed.event_types)
    record = await run_in_threadpool(
        lambda: service.store.webhooks.change(endpoint_id, caller.tenant_id, **values)
    )
    return _object(record)


@router.delete("/webhook_endpoints/{endpoint_id}")
def delete_webhook_endpoint(
    endpoint_id: str, service: ServiceDep, caller: CallerDep
) -> DeletedWebhookEndpoint:
    """Tell it nothing any more."""
    service.store.webhooks.delete(endpoint_id, caller.tenant_id)
    return DeletedWebhookEndpoint(id=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret", openapi_extra=_body(Rotation))
async def rotate_webhook_secret(
    endpoint_id: str, request: Request, service: ServiceDep, caller: CallerDep
) -> WebhookEndpointWithSecret:
    """Sign with a new secret; for a day also with the old one, if asked to."""
    await run_in_threadpool(service.store.webhooks.get, endpoint_id, caller.tenant_id)
    rotation = await _read(request, service, Rotation)
    keep_old = rotation.keep_old_secret_active_for_24_hours
    record = await run_in_threadpool(
        lambda: service.store.webhooks.rotate(endpoint_id, caller.tenant_id, keep_old=keep_old)
    )
    return _with_secret(record)


@router.post("/webhook_endpoints/{endpoint_id}/test", openapi_extra=_body(Trial))
async def test_webhook_endpoint(
    endpoint_id: str, request: Request, service: ServiceDep, caller: CallerDep
) -> WebhookTrialResult:
    """Send a sample event now, once, and say what was answered."""
    endpoint = await run_in_threadpool(service.store.webhooks.get, endpoint_id, caller.tenant_id)
    trial = await _read(request, service, Trial)
    sample = DeliveryRecord(
        endpoint.id, new_id("evt"), trial.event_type, "ftjob-sample", time.time(), 0, None, None, None
    )
    networks = parse_networks(service.settings.webhook_networks)
    try:
        status = await send(endpoint, sample.event_id, event_body(sample), networks)
    except (httpx.HTTPError, OSError) as error:
        raise WebhookError(
            f"the endpoint did not answer: {error or type(error).__name__}.",
            mend="Is it up, and reachable from the service?",
            code="webhook_unreachable",
        ) from None
    return WebhookTrialResult(
        webhook_endpoint_id=endpoint.id, event_type=trial.event_type, status_code=status
    )


@router.get("/webhook_event_types")
def list_webhook_event_types(caller: CallerDep) -> WebhookEventTypes:
    """The kinds of events there are."""
    return WebhookEventTypes(data=list(EVENT_TYPES))


async def _check(service: Service, url: str) -> None:
    """Refused now rather than by silence later; asked again at each delivery, since names may move."""
    check_url(url)
    await resolve(url, parse_networks(service.settings.webhook_networks))


async def _read(request: Request, service: Service, model: type[Body]) -> Body:
    body = await read_json(request, service.settings.max_body_bytes)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise config_error(error) from None


def _unique(event_types: list[EventType]) -> list[str]:
    return list(dict.fromkeys(event_types))


def _object(record: EndpointRecord) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=record.id,
        created_at=int(record.created_at),
        updated_at=int(record.updated_at),
        name=record.name,
        url=record.url,
        event_types=record.event_types,
        signing_secret_hint=f"whsec_…{record.secret[-4:]}",
    )


def _with_secret(record: EndpointRecord) -> WebhookEndpointWithSecret:
    return WebhookEndpointWithSecret(**_object(record).model_dump(), signing_secret=record.secret)
