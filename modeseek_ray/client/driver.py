"""`AttemptClient`: what a job's driver says to the service."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from modeseek_ray.client.answers import Json, finite, raise_for, unreachable


class AttemptClient:
    """What one driver says to the service. Each call raises `ServiceError`; `stale_fence` means stop.

    Nothing is retried here: the driver's journal spools and decides.
    """

    def __init__(self, base_url: str, job_id: str, attempt: int, *, token: str, fence: int) -> None:
        self._base_url = base_url.rstrip("/")
        self._attempt_url = f"{self._base_url}/internal/jobs/{job_id}/attempts/{attempt}"
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}", "X-Modeseek-Fence": str(fence)},
            timeout=httpx.Timeout(20.0, connect=5.0),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def spec(self) -> Json:
        """The job as a `JobSpec` in JSON."""
        return await self._call("GET", "")

    async def heartbeat(self, progress: Mapping[str, Any]) -> Any:
        """Renew the lease; returns what is desired: "run", "cancel" or "pause"."""
        return (await self._call("POST", "/heartbeat", progress))["desired"]

    async def events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Deliver numbered events; returns the newest number that is stored."""
        return int((await self._call("POST", "/events", {"events": list(events)}))["acknowledged"])

    async def checkpoint(self, step: int, path: str, metrics: Mapping[str, Any]) -> Json:
        """Commit a checkpoint that is complete on disk."""
        return await self._call(
            "POST", "/checkpoints", {"step": step, "path": path, "metrics": dict(metrics)}
        )

    async def prune(self, path: str) -> Json:
        """Say that a checkpoint is about to be deleted, before deleting it."""
        return await self._call("POST", "/checkpoints/prune", {"path": path})

    async def transition(
        self, to: str, *, error: Mapping[str, Any] | None = None, results: Mapping[str, Any] | None = None
    ) -> Json:
        """Move the job on. May be repeated when the answer was lost.

        `recovering` with an `error` gives this attempt up, and the service starts another; that is the
        driver's last word, and repeated it is refused as stale.
        """
        return await self._call("POST", "/transition", {"to": to, "error": error, "results": results})

    async def fetch(self, role: str, target: Path) -> None:
        """Bring the job's file of this role to `target`, whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = target.with_name(f".{target.name}.part")
        try:
            async with self._http.stream("GET", f"{self._attempt_url}/files/{role}") as response:
                if not response.is_success:
                    await response.aread()
                raise_for(response)
                with draft.open("wb") as file:
                    async for chunk in response.aiter_bytes():
                        file.write(chunk)
        except httpx.TransportError as error:
            raise unreachable(self._base_url, error) from error
        draft.replace(target)

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Json:
        content = None if body is None else json.dumps(finite(body), allow_nan=False, ensure_ascii=True)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            response = await self._http.request(
                method, f"{self._attempt_url}{path}", content=content, headers=headers
            )
        except httpx.TransportError as error:
            raise unreachable(self._base_url, error) from error
        raise_for(response)
        answer: Json = response.json()
        return answer
