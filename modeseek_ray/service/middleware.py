"""Around every request: an id, the time it took, and headers that browsers should see."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modeseek_ray.jobs.structured_logs import about
from modeseek_ray.service.errors import RequestError, error_response
from modeseek_ray.service.metrics import Metrics


class RequestIds:
    """Sets `x-request-id` on the answer and observes its latency under the route's template."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        on_end: list[Callable[[], None]] = []
        scope.setdefault("state", {}).update(request_id=request_id, on_end=on_end)
        started = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        app: ASGIApp = self._app
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            # PostgreSQL cannot even compare with such a text.
            app = error_response(RequestError("the URL holds a NUL character.", mend="Leave it away."))
        try:
            with about(request=request_id):
                await app(scope, receive, send_with_id)
        finally:
            for end in on_end:
                end()
            route = getattr(scope.get("route"), "path", "none")
            labels = (scope["method"], route, str(status))
            self._metrics.request_seconds.labels(*labels).observe(time.perf_counter() - started)
