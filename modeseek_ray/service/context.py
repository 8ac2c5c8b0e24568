"""What every route needs, and who is asking."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Header, Request

from modeseek_ray.errors import ModelError
from modeseek_ray.jobs.errors import ScopeError, TokenError
from modeseek_ray.jobs.launcher import Capacity, Validator
from modeseek_ray.jobs.models import resolve_model
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.reconciler import Reconciler
from modeseek_ray.jobs.records import DEFAULT_TENANT
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.bulletin import Bulletins
from modeseek_ray.service.limits import Limits
from modeseek_ray.service.metrics import Metrics
from modeseek_ray.service.notify import Notifier
from modeseek_ray.service.settings import ServiceSettings

if TYPE_CHECKING:
    from modeseek_ray.service.validations import Validations


@dataclass(frozen=True)
class Service:
    """The parts of one running service."""

    home: Home
    store: Store
    settings: ServiceSettings
    notifier: Notifier
    metrics: Metrics
    limits: Limits
    bulletins: Bulletins
    reconciler: Reconciler | None = None
    validator: Validator | None = None
    validations: Validations | None = None
    in_flight: set[tuple[str, str]] = field(default_factory=set)  # (tenant, Idempotency-Key)
    operator_token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""
        return 1 if self.reconciler is None else self.reconciler.settings.max_running_jobs

    async def capacity(self) -> Capacity | None:
        """What the cluster has; None where that is not known."""
        return None if self.reconciler is None else await self.reconciler.capacity()

    def wake(self) -> None:
        """Have the reconciler look now."""
        if self.reconciler is not None:
            self.reconciler.wake()

    def resolve_model(self, name: str, tenant_id: str, param: str = "model") -> Path:
        """The directory of a model this tenant may use. Raises `ModelError` naming `param`."""

        def lookup(known: str) -> Path | None:
            record = self.store.models.find(known, tenant_id)
            if record is None and self.store.models.checkpoint_path(known, tenant_id) is not None:
                raise ModelError(
                    f"{known} is a checkpoint to resume from, not an exported model.",
                    mend="Use the model of the finished job.",
                    code="checkpoint_not_exported",
                )
            return None if record is None else Path(record.path)

        try:
            return resolve_model(name, self.home, self.settings.roots, lookup)
        except ModelError as error:
            error.param = error.param or param
            raise


@dataclass(frozen=True)
class Caller:
    """Whose request this is."""

    tenant_id: str


async def get_service(request: Request) -> Service:
    """A coroutine, so that it costs no thread: every route asks."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


def get_caller(
    request: Request,
    service: ServiceDep,
    authorization: Annotated[str | None, Header()] = None,
    openai_organization: Annotated[str | None, Header()] = None,
) -> Caller:
    """The tenant of the key. Until the first key is made, this machine's own programs need none."""
    if not service.store.keys.required():
        _check_local(request)
        return _let_in(request, service, DEFAULT_TENANT)
    scheme, _, key = (authorization or "").partition(" ")
    record = service.store.keys.verify(key.strip()) if scheme.lower() == "bearer" else None
    if record is None:
        raise TokenError(
            "no valid API key was given.",
            mend="Send `Authorization: Bearer <key>`; the command line reads MODESEEK_API_KEY.",
        )
    if openai_organization not in (None, "", record.tenant_id):
        raise TokenError(
            "the key belongs to another organization.",
            mend="Leave OpenAI-Organization away, or name the key's own.",
            code="mismatched_organization",
        )
    if request.method not in ("GET", "HEAD") and "all" not in record.scopes:
        raise ScopeError(
            f"the key may {', '.join(record.scopes)} only.", mend="Use a key with the scope `all`."
        )
    return _let_in(request, service, record.tenant_id)


def _let_in(request: Request, service: Service, tenant_id: str) -> Caller:
    """Count the request against the tenant's limits; the middleware says when it has ended."""
    request.state.on_end.append(service.limits.enter(tenant_id))
    return Caller(tenant_id)


CallerDep = Annotated[Caller, Depends(get_caller)]


def is_loopback(host: str | None) -> bool:
    """Whether an address or host name means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return False


def _check_local(request: Request) -> None:
    """Without keys: from this machine, under its own name, and not from a page of somebody else's."""
    client = request.client.host if request.client else None
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    origin = request.headers.get("origin")
    foreign_page = origin is not None and not is_loopback(urlsplit(origin).hostname)
    if not is_loopback(client) or not is_loopback(host) or foreign_page:
        raise TokenError(
            "without API keys only programs of this machine are answered.",
            mend="Create a key for each user first.",
        )
