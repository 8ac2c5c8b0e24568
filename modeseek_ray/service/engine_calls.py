"""Finding the engine of a model, waiting for it, asking it; another one where it died.

The engine that answers is wanted in the store, the reconciler starts it. Nothing is kept here: after a
restart of the service the first request finds the engine that lives.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from fastapi.concurrency import run_in_threadpool

from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.engine_store import USEFUL, EngineRecord
from modeseek_ray.jobs.engine_wire import EngineSecret, Part, Question
from modeseek_ray.service.context import Service

_POLL_S = 0.05
_LOOK_S = 5.0  # a silent engine's lease is looked at so often
_TRIES = 3  # engines that died on a request, before it may be the request they die of
_RETRY_AFTER_S = 5.0


class EngineNotReadyError(ModeseekError):
    """No engine could answer in time; asking again later will help."""

    code = "model_starting"
    http_status = 503
    retry_after_s = _RETRY_AFTER_S


class EngineFailedError(ModeseekError):
    """The model's engine cannot be started, or died while it answered."""

    code = "engine_lost"
    http_status = 503
    retry_after_s = 1.0


class _EngineGoneError(Exception):
    """The engine does not answer any more."""


async def ask(service: Service, model: str, path: Path, question: Question) -> AsyncIterator[Part]:
    """The parts of the answer, as the engine writes them.

    An engine that is gone is replaced as long as nothing was handed out. Raises `EngineNotReadyError`,
    `EngineFailedError`, and what the engine itself refuses.
    """
    for attempt in range(_TRIES):
        engine = await ready_engine(service, model, path)
        begun = False
        try:
            async with _parts(service, engine, question) as parts:
                async for part in parts:
                    begun = True
                    yield part
            return
        except _EngineGoneError:
            await run_in_threadpool(service.store.engines.end, engine.id, "it did not answer")
            service.wake()
            if begun or attempt == _TRIES - 1:
                raise EngineFailedError(
                    f"the inference engine {engine.id} died while it answered.",
                    mend="Ask again: another one is started. If it happens again, `ray job logs` with that id"
                    " says why (often memory).",
                ) from None


async def ready_engine(service: Service, model: str, path: Path) -> EngineRecord:
    """The engine of a model directory, started if need be; waits for it as long as the operator lets it."""
    keeper = None if service.reconciler is None else service.reconciler.engines
    if keeper is None:
        raise EngineNotReadyError(
            "this service has no cluster to answer with.",
            mend="Start it by `modeseek serve`.",
            code="no_cluster",
        )
    started = time.monotonic()
    engine: EngineRecord | None = None
    while engine is None or engine.state != "ready":
        if engine is None or engine.state not in USEFUL:
            if engine is not None and engine.error is not None:
                raise _cannot_start(engine.error)
            engine = await run_in_threadpool(service.store.engines.want, model, str(path))
            service.wake()
            continue
        if time.monotonic() - started > keeper.settings.wait_s:
            raise _not_ready(engine, keeper.settings.wait_s)
        await asyncio.sleep(_POLL_S)
        engine = await run_in_threadpool(service.store.engines.look, engine)
    service.metrics.engine_wait_seconds.observe(time.monotonic() - started)
    return engine


def _cannot_start(problem: Mapping[str, Any]) -> EngineFailedError:
    """What kept it from starting will keep the next one from it, too."""
    return EngineFailedError(
        str(problem.get("message") or "the inference engine could not start."),
        mend=str(problem.get("mend") or "Look at the engine's log."),
        code="engine_failed",
    )


def _not_ready(engine: EngineRecord, waited_s: float) -> EngineNotReadyError:
    within = f"within {waited_s:.0f} s"
    if engine.state == "wanted":
        return EngineNotReadyError(
            f"all engines this service may run are busy with other models; none was free {within}.",
            mend="Ask again; the operator can allow more by MODESEEK_INFERENCE_MAX.",
            code="engines_busy",
        )
    if engine.submission_id is None:
        return EngineNotReadyError(
            f"Ray's job API did not take the model's engine {within}.",
            mend="`modeseek doctor` tells whether Ray's head is alive; ask again.",
            code="ray_unreachable",
        )
    if engine.cluster_status == "pending":
        return EngineNotReadyError(
            f"the cluster has had no room for the model's engine {within}: jobs hold its CPUs or GPUs.",
            mend="Ask again when a job has ended, or add nodes.",
            code="no_resources",
        )
    return EngineNotReadyError(f"the model is still being loaded after {waited_s:.0f} s.", mend="Ask again.")


@asynccontextmanager
async def _parts(
    service: Service, engine: EngineRecord, question: Question
) -> AsyncIterator[AsyncIterator[Part]]:
    """The answer's stream. Raises `_EngineGoneError` where there is none, or it breaks off."""
    token = await run_in_threadpool(_token_of, service, engine)
    timeout = httpx.Timeout(None, connect=5.0)
    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as http:
        request = http.build_request(
            "POST",
            f"{engine.address}/answer",
            content=question.model_dump_json(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            response = await http.send(request, stream=True)
        except httpx.TransportError as error:
            raise _EngineGoneError from error
        try:
            if response.status_code in (401, 503):  # it is ending, or another took its port
                raise _EngineGoneError
            response.raise_for_status()
            yield _read(service, engine, question, response)
        finally:
            await response.aclose()


async def _read(
    service: Service, engine: EngineRecord, question: Question, response: httpx.Response
) -> AsyncIterator[Part]:
    unfinished = len(question.seeds)
    lines = response.aiter_lines()
    while unfinished:
        try:
            line = await _next(service, engine, lines)
        except (StopAsyncIteration, httpx.TransportError) as error:
            raise _EngineGoneError from error
        if line.startswith('{"error"'):
            problem = json.loads(line)["error"]
            if problem.get("code") == "worker_failed":  # the writer broke
                raise _EngineGoneError
            raise EngineNotReadyError(problem["message"], mend=problem["mend"], code=problem["code"])
        part = Part.model_validate_json(line)
        unfinished -= part.finish_reason is not None
        yield part


async def _next(service: Service, engine: EngineRecord, lines: AsyncIterator[str]) -> str:
    """The next line, however long it takes, as long as the engine's lease holds."""
    waiting = asyncio.ensure_future(anext(lines))  # type: ignore[arg-type]
    try:
        while not (await asyncio.wait([waiting], timeout=_LOOK_S))[0]:
            record = await run_in_threadpool(service.store.engines.get, engine.id)
            if record is None or record.state == "ended":
                raise _EngineGoneError
        return waiting.result()
    finally:
        if not waiting.done():
            waiting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await waiting


def _token_of(service: Service, engine: EngineRecord) -> str:
    try:
        text = service.home.engine_secret(engine.id).read_text(encoding="utf-8")
    except OSError:
        raise _EngineGoneError from None
    return EngineSecret.model_validate_json(text).token
