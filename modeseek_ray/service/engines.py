"""What inference engines say about themselves. Not for users: the bearer is the engine's own token."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modeseek_ray.config import config_error
from modeseek_ray.jobs.errors import TokenError
from modeseek_ray.service.body import read_json
from modeseek_ray.service.context import ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES

router = APIRouter(prefix="/internal/engines/{engine_id}", responses=ERROR_RESPONSES, include_in_schema=False)


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class EngineHeartbeat(_Body):
    address: str = Field(pattern=r"^http://[0-9A-Za-z.:\[\]-]{1,100}$")
    ready: bool
    active: int = Field(ge=0, le=2**31 - 1)


class EngineLeft(_Body):
    outcome: str = Field(max_length=10_000)
    error: dict[str, Any] | None = None


def get_token(authorization: Annotated[str, Header()] = "") -> str:
    """The engine's token; the store finds out whether it is one."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise TokenError("no engine token was given.", mend="Only inference engines ask here.")
    return token


TokenDep = Annotated[str, Depends(get_token)]


@router.post("/heartbeat")
async def heartbeat(engine_id: str, token: TokenDep, request: Request, service: ServiceDep) -> dict[str, str]:
    """Renew the lease, and hear what is desired."""
    body = await _read(request, EngineHeartbeat)
    desired = await run_in_threadpool(
        service.store.engines.heartbeat,
        engine_id,
        token,
        address=body.address,
        ready=body.ready,
        active=body.active,
    )
    return {"desired": desired}


@router.post("/left")
async def left(engine_id: str, token: TokenDep, request: Request, service: ServiceDep) -> dict[str, str]:
    """The engine ends, and says why."""
    body = await _read(request, EngineLeft)
    await run_in_threadpool(service.store.engines.left, engine_id, token, body.outcome, body.error)
    service.wake()
    return {"desired": "stop"}


async def _read(request: Request, model: type[Any]) -> Any:
    body = await read_json(request, 100_000)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise config_error(error) from None
