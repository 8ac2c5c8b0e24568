"""`OperatorClient`: what `modeseek keys` asks of the service that runs on this home."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from modeseek_ray.client.answers import Json, raise_for
from modeseek_ray.errors import ServiceError


class OperatorClient:
    """Keys of a running service. Each call raises `ServiceError`."""

    def __init__(self, secret: Path) -> None:
        """`secret` is what the service wrote down at its start (`Home.operator`)."""
        try:
            told = json.loads(secret.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ServiceError(
                "another program holds this directory, and is no service that answers.",
                mend="A service that is just starting will soon; another `modeseek` command ends. Try again.",
                code="home_in_use",
            ) from None
        self._url = f"{told['url']}/internal/operator/keys"
        self._headers = {"Authorization": f"Bearer {told['token']}"}

    def list_keys(self) -> list[Json]:
        """Every key without its secret, oldest first."""
        found: list[Json] = self._call("GET")
        return found

    def create_key(self, name: str, tenant: str, scopes: Sequence[str]) -> Json:
        """`key`, which is shown this once, and its `record`."""
        made: Json = self._call("POST", json={"name": name, "tenant": tenant, "scopes": list(scopes)})
        return made

    def revoke_key(self, key_id: str) -> None:
        self._call("POST", f"/{key_id}/revoke")

    def remove_all_keys(self) -> int:
        """How many there were."""
        return int(self._call("DELETE")["removed"])

    def _call(self, method: str, path: str = "", **content: Any) -> Any:
        try:
            answer = httpx.request(
                method, self._url + path, headers=self._headers, timeout=20.0, trust_env=False, **content
            )
        except httpx.TransportError as error:
            raise ServiceError(
                f"the service that holds this directory does not answer at {self._url} ({error}).",
                mend="Is it just starting? In a container, run this command inside the service's own.",
                code="unreachable",
                http_status=503,
            ) from error
        raise_for(answer)
        return answer.json()
