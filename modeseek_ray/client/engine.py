"""`EngineClient`: what an inference engine says to the service."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

from modeseek_ray.client.answers import Json, finite, raise_for, unreachable


class EngineClient:
    """Each call raises `ServiceError`; `stale_fence` or `invalid_api_key` mean that the engine is over."""

    def __init__(self, base_url: str, engine_id: str, *, token: str) -> None:
        self._base_url = base_url.rstrip("/")
        self._engine_url = f"{self._base_url}/internal/engines/{engine_id}"
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            timeout=httpx.Timeout(10.0, connect=5.0),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def heartbeat(self, *, address: str, ready: bool, active: int) -> str:
        """Renew the lease; returns what is desired: "run" or "stop"."""
        body = {"address": address, "ready": ready, "active": active}
        return str((await self._call("/heartbeat", body))["desired"])

    async def left(self, outcome: str, error: Mapping[str, Any] | None = None) -> None:
        """Say that it ends, and why."""
        await self._call("/left", {"outcome": outcome, "error": error})

    async def _call(self, path: str, body: Mapping[str, Any]) -> Json:
        content = json.dumps(finite(body), allow_nan=False)
        try:
            response = await self._http.post(f"{self._engine_url}{path}", content=content)
        except httpx.TransportError as error:
            raise unreachable(self._base_url, error) from error
        raise_for(response)
        answer: Json = response.json()
        return answer
