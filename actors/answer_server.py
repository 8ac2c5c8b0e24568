"""An inference engine's process: listens, reports to the service, ends itself.

It ends when nothing was asked of it for a while, when the service says so or no longer knows it, when
its lease cannot be renewed, and when the writer broke. Whatever the reason, it tells the service if it
can, so that the next request starts another at once.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from actors.answer_loop import AnswerLoop
from actors.answer_writer import Writer
from modeseek_ray.client import EngineClient
from modeseek_ray.errors import ModeseekError, ServiceError, WorkerError
from modeseek_ray.jobs.engine_wire import EngineSecret, Question

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
_OVER = ("stale_fence", "invalid_api_key")


class AnswerServer:
    """`await run()` until the engine's end; the writer is started by `start`, in a thread."""

    def __init__(
        self,
        secret: EngineSecret,
        start: Callable[[EngineSecret], Writer],
        *,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._secret = secret
        self._start = start
        self._heartbeat_s = heartbeat_s
        self._client = EngineClient(secret.url, secret.engine, token=secret.token)
        self._answers: AnswerLoop | None = None
        self._used_at = time.monotonic()
        self._active = 0
        self._over: asyncio.Future[str] | None = None

    async def run(self) -> str:
        """Returns why it ended. Raises what kept the writer from starting, after telling the service."""
        self._over = asyncio.get_running_loop().create_future()
        with _listen(self._secret.url, self._secret.ports) as listener:
            address = "http://{}:{}".format(*listener.getsockname()[:2])
            config = uvicorn.Config(
                self._app(), log_level="warning", access_log=False, timeout_graceful_shutdown=2, ws="none"
            )
            server = _Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            beating = asyncio.create_task(self._beat(address))
            outcome, error = "ended", None
            try:
                writer = await self._unless_over(asyncio.to_thread(self._start, self._secret))
                if writer is not None:
                    self._answers = AnswerLoop(writer)
                    self._used_at = time.monotonic()
                    watching = asyncio.create_task(self._watch(self._answers))
                    await self._over
                    watching.cancel()
                outcome = self._over.result()
            except ModeseekError as failure:
                outcome, error = f"it could not start: {failure.message}", failure
                raise
            except asyncio.CancelledError:
                outcome = "ended from outside"
                raise
            except Exception as failure:
                outcome = f"it could not start: {failure!r}"
                error = WorkerError(f"the inference engine could not start: {failure!r}.",
                                    mend="The process's log has the traceback; often memory.")  # fmt: skip
                raise
            finally:
                beating.cancel()
                with suppress(ServiceError):
                    await self._client.left(outcome, None if error is None else error.to_dict())
                server.should_exit = True
                await asyncio.gather(serving, beating, return_exceptions=True)
                await self._client.close()
        return outcome

    def end(self, outcome: str) -> None:
        """End soon, for this reason."""
        if self._over is not None and not self._over.done():
            self._over.set_result(outcome)

    async def _unless_over(self, starting: Any) -> Writer | None:
        """The writer, or None if the engine is to end before it is there; its thread is left alone then."""
        assert self._over is not None
        task = asyncio.ensure_future(starting)
        await asyncio.wait([task, self._over], return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None

    async def _beat(self, address: str) -> None:
        """Report; a service that is away is borne as long as the lease lasts."""
        renewed_at = time.monotonic()
        while True:
            ready = self._answers is not None
            try:
                desired = await self._client.heartbeat(address=address, ready=ready, active=self._active)
                renewed_at = time.monotonic()
                if desired == "stop":
                    self.end("stopped")
            except Exception as error:
                if isinstance(error, ServiceError) and error.code in _OVER:
                    self.end("the service does not know it any more")
                elif time.monotonic() - renewed_at > self._secret.lease_s:
                    self.end("its lease could not be renewed")
                else:
                    log.warning("no heartbeat: %s", error)
            # Somebody waits for an engine that starts: that it is ready should be known at once.
            pauses = int(self._heartbeat_s / 0.1)
            for _ in range(max(1, pauses)):
                await asyncio.sleep(min(0.1, self._heartbeat_s))
                if not ready and self._answers is not None:
                    break

    async def _watch(self, answers: AnswerLoop) -> None:
        """Ends the engine when it is idle for too long, or broke."""
        while not answers.broken.is_set():
            if not self._active and time.monotonic() - self._used_at > self._secret.idle_s:
                self.end("idle")
            with suppress(TimeoutError):
                await asyncio.wait_for(answers.broken.wait(), min(0.5, self._secret.idle_s / 4))
        self.end("the writer broke")

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

        @app.post("/answer")
        async def answer(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._secret.token.encode()):
                return JSONResponse({"error": {"message": "who asks?"}}, status_code=401)
            if self._answers is None or (self._over is not None and self._over.done()):
                return JSONResponse({"error": {"message": "not ready"}}, status_code=503)
            try:
                question = Question.model_validate_json(await request.body())
            except ValidationError as error:
                return JSONResponse({"error": {"message": str(error)}}, status_code=400)
            return StreamingResponse(self._lines(self._answers, question), media_type="application/x-ndjson")

        return app

    async def _lines(self, answers: AnswerLoop, question: Question) -> AsyncIterator[str]:
        self._active += 1
        parts = answers.answer(question)
        try:
            async for part in parts:
                yield part.model_dump_json() + "\n"
        except WorkerError as error:
            yield json.dumps({"error": error.to_dict()}) + "\n"
        finally:
            await parts.aclose()  # type: ignore[attr-defined]
            self._active -= 1
            self._used_at = time.monotonic()


class _Server(uvicorn.Server):
    """Signals are for the process, not for its HTTP server."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(service_url: str, ports: tuple[int, int]) -> socket.socket:
    """Where the service can reach us: on loopback if it is there itself, else on the address that leads to it.

    Raises `WorkerError` where all `ports` are taken.
    """
    parts = urlsplit(service_url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 443
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        own = probe.getsockname()[0]
    for number in range(ports[0], ports[1] + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((own, number))
        except OSError:
            listener.close()
        else:
            return listener
    raise WorkerError(
        f"all ports from {ports[0]} to {ports[1]} are taken on {own}.",
        mend="Widen MODESEEK_INFERENCE_PORTS, or have fewer engines.",
    )
