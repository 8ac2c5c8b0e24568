"""What both clients make of an answer, and of no answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx

from modeseek_ray.errors import ServiceError

Json = dict[str, Any]


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null.

    >>> finite({"loss": float("nan"), "step": 3})
    {'loss': None, 'step': 3}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())  # a numpy scalar or array
    return value


def raise_for(response: httpx.Response) -> None:
    """Raise the service's error as `ServiceError`; nothing for a good answer."""
    if not response.is_error:
        return
    body: Any = {}
    with suppress(ValueError):
        body = response.json()
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {"message": f"the service answered {response.status_code}."}
    mend = str(error.get("mend") or "")
    message = str(error.get("message") or f"the service answered {response.status_code}.")
    raise ServiceError(
        message.removesuffix(mend).rstrip(),  # OpenAI's body has one sentence; the mend is its end
        http_status=response.status_code,
        code=error.get("code") or "service_error",
        param=error.get("param"),
        mend=mend,
    )


def unreachable(url: str, error: Exception) -> ServiceError:
    return ServiceError(
        f"no answer from {url} ({error or type(error).__name__}).",
        mend="Start it with `modeseek serve`, or set MODESEEK_URL.",
        code="unreachable",
        http_status=503,
    )
