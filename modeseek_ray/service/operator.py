"""What the operator's own commands ask of a running service: keys. The bearer is the token in the home.

An SQLite store has one writer, and while the service runs that is the service. So `modeseek keys` asks
it, with a token that is made at each start and that only the owner of the home can read.
"""

from __future__ import annotations

import hmac
import logging
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modeseek_ray.config import config_error
from modeseek_ray.jobs.errors import TokenError
from modeseek_ray.jobs.records import DEFAULT_TENANT
from modeseek_ray.service.body import read_json
from modeseek_ray.service.context import ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 10_000


class NewKey(BaseModel):
    """Whose key, of which tenant, and what it may do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=256)
    tenant: str = Field(DEFAULT_TENANT, min_length=1, max_length=256)
    scopes: list[Literal["all", "read"]] = Field(["all"], min_length=1, max_length=2)


def only_the_operator(service: ServiceDep, authorization: Annotated[str, Header()] = "") -> None:
    """Raises `TokenError` for anybody who has not read this home's secret."""
    scheme, _, token = authorization.partition(" ")
    known = hmac.compare_digest(token.encode(), service.operator_token.encode())
    if scheme.lower() != "bearer" or not known:
        raise TokenError(
            "the operator's token is wrong.", mend="Use `modeseek keys` on the service's machine."
        )


router = APIRouter(
    prefix="/internal/operator/keys",
    responses=ERROR_RESPONSES,
    include_in_schema=False,
    dependencies=[Depends(only_the_operator)],
)


@router.get("")
def list_keys(service: ServiceDep) -> list[dict[str, Any]]:
    """Every key, revoked ones too, without its secret."""
    return [asdict(record) for record in service.store.keys.all()]


@router.post("")
async def create_key(request: Request, service: ServiceDep) -> dict[str, Any]:
    """A new key, shown this once."""
    try:
        new = NewKey.model_validate(await read_json(request, _MAX_BODY_BYTES))
    except ValidationError as error:
        raise config_error(error) from None
    key, record = await run_in_threadpool(
        service.store.keys.create, new.name, tenant_id=new.tenant, scopes=tuple(new.scopes)
    )
    return {"key": key, "record": asdict(record)}


@router.post("/{key_id}/revoke")
def revoke_key(key_id: str, service: ServiceDep) -> dict[str, Any]:
    """Refuse it from the next request on."""
    service.store.keys.revoke(key_id)
    return asdict(service.store.keys.get(key_id))


@router.delete("")
def remove_all_keys(service: ServiceDep) -> dict[str, int]:
    """Need no keys any more."""
    removed = service.store.keys.remove_all()
    log.warning("all %d keys were removed: programs of this machine are answered without one", removed)
    return {"removed": removed}
