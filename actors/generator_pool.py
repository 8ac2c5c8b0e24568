"""Requests over engines: spread by load, redone where an engine died, never across two versions.

A prompt's N requests are one piece of work and go to one engine, which then computes the prompt
once. Each engine holds at most so many requests and is handed more when it has written some, so a
slow engine takes fewer. An engine that dies is replaced and brought to the version all write with;
what it had not finished is asked for again, by the same requests.

    P  prompts      N  completions of a prompt
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.generator import GeneratorSpec, Request, requests_of
from actors.rest import Rest
from actors.weight_chunks import WeightRelease
from actors.workers import Worker
from modeseek_ray.errors import WorkerError
from modeseek_ray.types import Completion, Prompt

# A turn comes back at least this often, so that new requests get in and a restart does not wait long.
SLICE_S = 1.0
MAX_REPLACEMENTS = 8  # of all engines together; a job that loses more has a cause that will not go away
MAX_REDOS = 3  # of one prompt: engines may be dying of it

Start = Callable[[int], Awaitable[Worker]]

_log = logging.getLogger(__name__)


@dataclass
class _Work:
    """One prompt and which of its completions are there."""

    prompt: Prompt
    requests: dict[str, int]  # id -> which of the N; those that are not written yet
    by_id: Mapping[str, Request]
    written: list[Completion | None]
    done: asyncio.Future[None]
    redos: int = 0

    def open_requests(self) -> list[Request]:
        return [self.by_id[name] for name in self.requests]


@dataclass
class _Engine:
    """One engine and the work it holds."""

    index: int
    worker: Worker
    holds: dict[str, _Work] = field(default_factory=dict)  # by request id
    starting: bool = False  # it died, and another is not yet there

    @property
    def at_rest(self) -> bool:
        return not (self.holds or self.starting)


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
        self._engines: list[_Engine] = []
        self._servers: list[asyncio.Task[None]] = []
        self._queue: deque[_Work] = deque()
        self._num_works = 0
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
        self._engines = [_Engine(i, await self._start(i)) for i in range(self.count)]
        facts = await asyncio.gather(*(engine.worker.call("setup") for engine in self._engines))
        self._servers = [asyncio.create_task(self._serve(engine)) for engine in self._engines]
        return {**facts[0], "engines": self.count}

    async def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[list[Completion]]:
        """The completions of each prompt, in order. The same (job, prompt, round) gives the same requests.

        May be called again before it has answered. Raises what stopped the engines.
        """
        self._refuse_broken()
        works = [self._work(prompt, round_) for prompt in prompts]
        async with self._rest.awake():
            async with self._changed:
                self._queue.extend(works)
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

    async def _insist(self, engine: _Engine, method: str, *args: Any) -> Any:
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

    async def _rest_one(self, engine: _Engine, method: str) -> None:
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

    async def _serve(self, engine: _Engine) -> None:
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

    def _has_turn(self, engine: _Engine) -> bool:
        return self._broken is not None or bool(engine.holds) or (self._held is None and bool(self._queue))

    def _take(self, engine: _Engine) -> tuple[list[Request], int]:
        """New requests for this engine, and how many it may leave unfinished when it comes back.

        While more work waits, the batch stays full: as many requests wait inside as are being written.
        """
        new: list[Request] = []
        if self._held is not None:
            return new, 0
        capacity = 2 * self.spec.max_num_seqs
        # What engines would get if they shared evenly, so that the first does not take everything.
        share = -(-sum(len(w.requests) for w in self._queue) // len(self._engines))
        room = min(capacity - len(engine.holds), max(share, self.spec.sampling.samples_per_prompt))
        while self._queue and (len(self._queue[0].requests) <= room or not (engine.holds or new)):
            work = self._queue.popleft()
            if work.done.done():  # whoever asked has gone
                continue
            requests = work.open_requests()
            room -= len(requests)
            new += requests
            engine.holds.update((request.id, work) for request in requests)
        return new, min(self.spec.max_num_seqs, len(engine.holds) - 1) if self._queue else 0

    async def _deliver(self, engine: _Engine, finished: Sequence[tuple[str, Completion]]) -> None:
        async with self._changed:
            for name, completion in finished:
                self.num_written += 1
                work = engine.holds.pop(name)
                work.written[work.requests.pop(name)] = completion
                if not work.requests and not work.done.done():
                    work.done.set_result(None)
            self._changed.notify_all()

    async def _throw_away(self, engine: _Engine) -> None:
        """Give up what this engine is writing; it waits in front of the queue."""
        if engine.holds:
            try:
                await engine.worker.call("abort")
            except WorkerError as error:
                await self._replace(engine, error)
                return
        async with self._changed:
            self._requeue(engine)
            self._changed.notify_all()

    async def _replace(self, engine: _Engine, error: WorkerError) -> None:
        """Another engine in its place, at the installed version; its unfinished work is redone."""
        async with self._changed:
            engine.starting = True
            self._requeue(engine, failed=error)
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

    def _requeue(self, engine: _Engine, failed: WorkerError | None = None) -> None:
        works = list(dict.fromkeys(map(id, engine.holds.values())))
        by_id = {id(work): work for work in engine.holds.values()}
        engine.holds.clear()
        for key in reversed(works):
            work = by_id[key]
            if work.done.done():
                continue
            if failed is not None:
                work.redos += 1
                if work.redos > MAX_REDOS:
                    work.done.set_exception(
                        WorkerError(
                            f"{work.redos} engines died while they wrote for prompt {work.prompt.ordinal}: {failed}",
                            mend="Look at this prompt, and at the engines' logs for what they died of.",
                        )
                    )
                    continue
            self._queue.appendleft(work)

    async def _bring(self, engine: _Engine) -> None:
        """This engine to the installed weights, by a new engine if need be."""
        assert self._installed is not None
        try:
            await self._load(engine, self._installed)
        except WorkerError as error:
            await self._replace(engine, error)

    async def _load(self, engine: _Engine, release: WeightRelease) -> None:
        """In one call, which costs as much as copying megabytes. Chunks are arguments: Ray fetches those alone."""
        await engine.worker.call("install", release.version, release.checksum, *release.chunks)

    # --- the queue

    def _work(self, prompt: Prompt, round_: int) -> _Work:
        # Asked twice at once, by whoever gave up and came back, they are still told apart inside an engine.
        self._num_works += 1
        requests = [
            replace(request, id=f"{request.id}.{self._num_works}")
            for request in requests_of(self.spec, prompt, round_)
        ]
        return _Work(
            prompt=prompt,
            requests={request.id: i for i, request in enumerate(requests)},
            by_id={request.id: request for request in requests},
            written=[None] * len(requests),
            done=asyncio.get_running_loop().create_future(),
        )

    async def _break(self, error: BaseException) -> None:
        """Tell everybody who waits. The first cause stays."""
        async with self._changed:
            if self._broken is None:
                self._broken = error
            works = [*self._queue, *(work for engine in self._engines for work in engine.holds.values())]
            self._queue.clear()
            for work in works:
                if not work.done.done():
                    work.done.set_exception(self._broken)
            self._changed.notify_all()

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise self._broken
