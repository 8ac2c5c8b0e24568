"""Requests over engines: spread by load, redone where an engine died, never across two versions.

A prompt's N requests go to one engine, which then computes the prompt once. Each engine holds at most
so many requests and is handed more when it has written some, so a slow engine takes fewer. An engine
that dies is replaced and brought to the version all write with; what it had not finished is asked for
again, by the same requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.generation_queue import Engine, GenerationQueue
from actors.generator import GeneratorSpec, Request
from actors.rest import Rest
from actors.weight_chunks import WeightRelease
from actors.workers import Worker
from modeseek_ray.errors import WorkerError
from modeseek_ray.types import Completion, Prompt

# A turn comes back at least this often, so that new requests get in and a restart does not wait long.
SLICE_S = 1.0
MAX_REPLACEMENTS = 8  # of all engines together; a job that loses more has a cause that will not go away

Start = Callable[[int], Awaitable[Worker]]

_log = logging.getLogger(__name__)


class GeneratorPool:
    """`roles.Generator` over engines. `start(i)` gives a new worker in the place of engine i.

    `hold`, then `install`, then `release` replace the weights. Between `hold` and `release` nothing
    is written; requests wait, and are answered by the new version.
    """

    def __init__(
        self,
        spec: GeneratorSpec,
        start: Start,
        count: int,
        *,
        slice_s: float = SLICE_S,
        max_replacements: int = MAX_REPLACEMENTS,
    ) -> None:
        self.spec = spec
        self._start = start
        self.count = count
        self._slice_s = slice_s
        self._replacements_left = max_replacements
        self._engines: list[Engine] = []
        self._servers: list[asyncio.Task[None]] = []
        self._queue = GenerationQueue(spec)
        self._version = 0
        self._installed: WeightRelease | None = None
        self._held: Literal["drain", "restart"] | None = None
        self._changed = asyncio.Condition()
        self._broken: BaseException | None = None
        self._rest = Rest(self._rest_or_wake, sleeps=spec.sleeps)
        # Awaited before engines that sleep wake up, by whoever shares their GPUs: torch keeps what it once took.
        self.make_room: Callable[[], Awaitable[None]] | None = None
        self.num_replaced = 0
        self.num_written = 0  # completions, of all engines

    @property
    def version(self) -> int:
        """Of the weights that write now; 0 = the starting model's."""
        return self._version

    @property
    def installed(self) -> WeightRelease | None:
        """The weights engines are brought to when they start; None = those of the model directory."""
        return self._installed

    async def setup(self) -> Mapping[str, Any]:
        """Start every engine. Returns the first one's facts."""
        self._engines = [Engine(i, await self._start(i)) for i in range(self.count)]
        facts = await asyncio.gather(*(engine.worker.call("setup") for engine in self._engines))
        self._servers = [asyncio.create_task(self._serve(engine)) for engine in self._engines]
        return {**facts[0], "engines": self.count}

    async def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[list[Completion]]:
        """The completions of each prompt, in order. The same (job, prompt, round) gives the same requests.

        May be called again before it has answered. Raises what stopped the engines.
        """
        self._refuse_broken()
        works = [self._queue.work(prompt, round_) for prompt in prompts]
        async with self._rest.awake():
            async with self._changed:
                self._queue.add(works)
                self._changed.notify_all()
            try:
                await asyncio.gather(*(work.done for work in works))
            except BaseException:
                for work in works:  # nobody waits for the others any more
                    work.done.cancel()
                raise
        return [[c for c in work.written if c is not None] for work in works]

    async def hold(self, mode: Literal["drain", "restart"] = "drain") -> None:
        """Let nothing new begin, and wait until no request is inside an engine and no engine is being replaced.

        `drain`: what is being written is finished, by the version that began it. `restart`: it is
        thrown away and asked for again after `release`; the new version then writes all of it.
        """
        self._refuse_broken()
        if self._held is None:
            await self._rest.enter()
        async with self._changed:
            self._held = mode
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: self._broken is not None or all(engine.at_rest for engine in self._engines)
            )
        self._refuse_broken()

    async def install(self, release: WeightRelease) -> None:
        """Give every engine these weights. Await `hold` before; nothing writes before `release`.

        An engine that fails is replaced and given them, too; when that fails, this raises and the
        pool writes no more. Engines in the middle of an update are of no version.
        """
        previous, self._installed = self._installed, release
        try:
            await asyncio.gather(*(self._bring(engine) for engine in self._engines))
        except BaseException as error:
            self._installed = previous
            await self._break(error)
            raise

    async def score(self, sequences: Sequence[NDArray[np.int32]]) -> list[list[NDArray[np.float64]]]:
        """By engine: log-probability of each token but the first, at temperature one. Await `hold` before."""

        asked = (self._insist(engine, "score", sequences) for engine in self._engines)
        return list(await asyncio.gather(*asked))

    async def _insist(self, engine: Engine, method: str, *args: Any) -> Any:
        """Ask an engine at rest, and whichever takes its place, until one answers."""
        while True:
            try:
                return await engine.worker.call(method, *args)
            except WorkerError as error:
                await self._replace(engine, error)

    async def _rest_or_wake(self, method: str) -> None:
        """`sleep` or `wake` on every engine, once nothing is inside any; nothing where the pool is broken."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._broken is not None or all(engine.at_rest for engine in self._engines)
            )
        if self._broken is None:
            if method == "wake" and self.make_room is not None:
                await self.make_room()
            await asyncio.gather(*(self._rest_one(engine, method) for engine in self._engines))

    async def _rest_one(self, engine: Engine, method: str) -> None:
        """A new engine in the place of one that died of it is awake."""
        try:
            await engine.worker.call(method)
        except WorkerError as error:
            await self._replace(engine, error)
            if method == "sleep":
                await self._insist(engine, method)

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """The same call on every engine; nothing is redone or replaced. Await `hold` before."""
        return await self.call_each(method, [args] * self.count)

    async def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """A call on every engine, each with its own arguments."""
        pairs = zip(self._engines, arguments, strict=True)
        return list(await asyncio.gather(*(engine.worker.call(method, *args) for engine, args in pairs)))

    async def release(self, version: int) -> None:
        """Write again, from now on as `version`: that of the installed weights, or the old one."""
        async with self._changed:
            self._version = version
            was_held, self._held = self._held is not None, None
            self._changed.notify_all()
        if was_held:
            await self._rest.leave()

    async def refuse(self, error: BaseException) -> None:
        """Write no more: the weights inside the engines are not what they should be."""
        await self._break(error)

    async def close(self) -> None:
        for server in self._servers:
            server.cancel()
        await asyncio.gather(*self._servers, return_exceptions=True)
        await self._break(WorkerError("the generators were closed.", mend="Nothing: the job is over."))
        await asyncio.gather(*(engine.worker.stop() for engine in self._engines), return_exceptions=True)
        self._installed = None

    # --- one engine

    async def _serve(self, engine: Engine) -> None:
        """Keep one engine busy until the pool is closed or broken."""
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._has_turn(engine))
                    if self._broken is not None:
                        return
                    new, leave = self._take(engine)
                if self._held == "restart":
                    await self._throw_away(engine)
                    continue
                try:
                    finished = await engine.worker.call("turn", new, leave, self._slice_s)
                except WorkerError as error:
                    await self._replace(engine, error)
                    continue
                await self._deliver(engine, finished)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            await self._break(error)

    def _has_turn(self, engine: Engine) -> bool:
        return self._broken is not None or bool(engine.holds) or (self._held is None and bool(self._queue))

    def _take(self, engine: Engine) -> tuple[list[Request], int]:
        return self._queue.take(engine, len(self._engines)) if self._held is None else ([], 0)

    async def _deliver(self, engine: Engine, finished: Sequence[tuple[str, Completion]]) -> None:
        async with self._changed:
            self.num_written += len(finished)
            self._queue.deliver(engine, finished)
            self._changed.notify_all()

    async def _throw_away(self, engine: Engine) -> None:
        """Give up what this engine is writing; it waits in front of the queue."""
        if engine.holds:
            try:
                await engine.worker.call("abort")
            except WorkerError as error:
                await self._replace(engine, error)
                return
        async with self._changed:
            self._queue.put_back(engine)
            self._changed.notify_all()

    async def _replace(self, engine: Engine, error: WorkerError) -> None:
        """Another engine in its place, at the installed version; its unfinished work is redone."""
        async with self._changed:
            engine.starting = True
            self._queue.put_back(engine, failed=error)
            self._changed.notify_all()
        while True:
            if self._replacements_left == 0:
                raise WorkerError(
                    f"generator {engine.index} failed again, and enough engines were replaced: {error}",
                    mend="Look at the engines' logs; often memory: lower kv_cache_gib or max_num_seqs.",
                ) from error
            self._replacements_left -= 1
            self.num_replaced += 1
            _log.warning("generator %d is replaced: %s", engine.index, error)
            try:
                await engine.worker.stop()
            except Exception as gone:
                _log.info("stopping generator %d: %s", engine.index, gone)
            try:
                engine.worker = await self._start(engine.index)
                await engine.worker.call("setup")
                if self._installed is not None:
                    await self._load(engine, self._installed)
                break
            except WorkerError as next_error:
                error = next_error
        async with self._changed:
            engine.starting = False
            self._changed.notify_all()

    async def _bring(self, engine: Engine) -> None:
        """This engine to the installed weights, by a new engine if need be."""
        assert self._installed is not None
        try:
            await self._load(engine, self._installed)
        except WorkerError as error:
            await self._replace(engine, error)

    async def _load(self, engine: Engine, release: WeightRelease) -> None:
        """In one call, which costs as much as copying megabytes. Chunks are arguments: Ray fetches those alone."""
        await engine.worker.call("install", release.version, release.checksum, *release.chunks)

    async def _break(self, error: BaseException) -> None:
        """Tell everybody who waits. The first cause stays."""
        async with self._changed:
            if self._broken is None:
                self._broken = error
            self._queue.fail(self._engines, self._broken)
            self._changed.notify_all()

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise self._broken
