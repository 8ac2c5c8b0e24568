"""Prompts that wait for an engine, and what each engine holds of them.

A prompt's N requests are one piece of work and go to one engine. Nothing here waits: `GeneratorPool` calls
under its condition, and tells who waits.

    P  prompts      N  completions of a prompt
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.generator import GeneratorSpec, Request, requests_of
from actors.workers import Worker
from modeseek_ray.errors import WorkerError
from modeseek_ray.types import Completion, Prompt

MAX_REDOS = 3  # of one prompt: engines may be dying of it


@dataclass
class Work:
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
class Engine:
    """One engine and the work it holds."""

    index: int
    worker: Worker
    holds: dict[str, Work] = field(default_factory=dict)  # by request id
    starting: bool = False  # it died, and another is not yet there

    @property
    def at_rest(self) -> bool:
        return not (self.holds or self.starting)


class GenerationQueue:
    """First in, first out; what an engine gives up goes to the front."""

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._waiting: deque[Work] = deque()
        self._num_works = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def work(self, prompt: Prompt, round_: int) -> Work:
        """The requests of a prompt, not yet in line."""
        # Asked twice at once, by whoever gave up and came back, they are still told apart inside an engine.
        self._num_works += 1
        requests = [
            replace(request, id=f"{request.id}.{self._num_works}")
            for request in requests_of(self._spec, prompt, round_)
        ]
        return Work(
            prompt=prompt,
            requests={request.id: i for i, request in enumerate(requests)},
            by_id={request.id: request for request in requests},
            written=[None] * len(requests),
            done=asyncio.get_running_loop().create_future(),
        )

    def add(self, works: Iterable[Work]) -> None:
        self._waiting.extend(works)

    def take(self, engine: Engine, num_engines: int) -> tuple[list[Request], int]:
        """New requests for this engine, and how many it may leave unfinished when it comes back.

        While more work waits, the batch stays full: as many requests wait inside as are being written.
        """
        new: list[Request] = []
        capacity = 2 * self._spec.max_num_seqs
        # What engines would get if they shared evenly, so that the first does not take everything.
        share = -(-sum(len(w.requests) for w in self._waiting) // num_engines)
        room = min(capacity - len(engine.holds), max(share, self._spec.sampling.samples_per_prompt))
        while self._waiting and (len(self._waiting[0].requests) <= room or not (engine.holds or new)):
            work = self._waiting.popleft()
            if work.done.done():  # whoever asked has gone
                continue
            requests = work.open_requests()
            room -= len(requests)
            new += requests
            engine.holds.update((request.id, work) for request in requests)
        return new, min(self._spec.max_num_seqs, len(engine.holds) - 1) if self._waiting else 0

    def deliver(self, engine: Engine, finished: Sequence[tuple[str, Completion]]) -> None:
        """What an engine has written."""
        for name, completion in finished:
            work = engine.holds.pop(name)
            work.written[work.requests.pop(name)] = completion
            if not work.requests and not work.done.done():
                work.done.set_result(None)

    def put_back(self, engine: Engine, failed: WorkerError | None = None) -> None:
        """All that an engine holds to the front of the line. `failed`: what it died of, a prompt perhaps."""
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
            self._waiting.appendleft(work)

    def fail(self, engines: Collection[Engine], error: BaseException) -> None:
        """Tell everybody who waits, for what is in line and for what `engines` hold."""
        works = [*self._waiting, *(work for engine in engines for work in engine.holds.values())]
        self._waiting.clear()
        for work in works:
            if not work.done.done():
                work.done.set_exception(error)
