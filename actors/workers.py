"""A worker as its pool sees it, and many of them at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol

from modeseek_ray.errors import WorkerError

# How long a rank that failed may have been the first to hear that another died.
DEATH_GRACE_S = 10.0
_DEATHS = ("worker_died", "out_of_memory")


class Worker(Protocol):
    """One worker process (or object). Calls are executed in the order they are made."""

    # Whether what a method yields to `stream` is copied before the method goes on.
    copies_stream: bool

    async def call(self, method: str, *args: Any) -> Any: ...

    def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """A handle on each thing `method` yields: the thing itself, or a reference that workers are handed."""
        ...

    async def fetch(self, reference: Any) -> Any:
        """What such a handle stands for. Small things only. Raises what `call` would."""
        ...

    async def stop(self) -> None: ...


async def together(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All workers' answers. The first failure wins: the others may be waiting for it in a collective.

    Unless it is an unforeseen one and a rank turns out to have died: its neighbours hear of that as a
    broken connection, often before we do.
    """
    calls = [asyncio.ensure_future(call) for call in work]
    try:
        return list(await asyncio.gather(*calls))
    except WorkerError as error:
        death = await _death_among(calls) if error.code == "worker_failed" else None
        if death is None:
            raise
        raise death from error
    finally:
        for call in calls:
            call.cancel()


async def _death_among(calls: Sequence[asyncio.Future[Any]]) -> WorkerError | None:
    """The error that says that a rank died, if one does so within `DEATH_GRACE_S`."""
    ends = time.monotonic() + DEATH_GRACE_S
    while True:
        for call in calls:
            error = call.exception() if call.done() and not call.cancelled() else None
            if isinstance(error, WorkerError) and error.code in _DEATHS:
                return error
        pending = [call for call in calls if not call.done()]
        left_s = ends - time.monotonic()
        if not pending or left_s <= 0:
            return None
        await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
