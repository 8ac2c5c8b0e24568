"""What event streams send, read and written out once for all streams that have come equally far."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool
from fastapi.sse import format_sse_event

from modeseek_ray.jobs.event_store import EventStore
from modeseek_ray.service.notify import Notifier
from modeseek_ray.service.wire import event_object

_BATCH = 200


@dataclass(frozen=True)
class Bulletin:
    """The next events of a job as server-sent events."""

    text: bytes  # empty where there is nothing new
    sequence: int  # of the last event in it
    is_full: bool  # more may follow at once
    is_over: bool  # nothing follows, ever


class Bulletins:
    """A change of a job wakes all who listen to it, and all ask for the same."""

    def __init__(self, events: EventStore, notifier: Notifier) -> None:
        self._events = events
        self._notifier = notifier
        self._under_way: dict[tuple[str, int, int], asyncio.Task[Bulletin]] = {}

    async def after(self, job_id: str, sequence: int) -> Bulletin:
        """What follows event number `sequence`. Call it while listening, after the event was cleared.

        Who asks shares a look that is under way only if the job has not changed since that began: a change
        in between will wake it again, or is counted already, and then the look is another.
        """
        key = (job_id, sequence, self._notifier.changes(job_id))
        look = self._under_way.get(key)
        if look is None:
            look = asyncio.ensure_future(run_in_threadpool(self._look, job_id, sequence))
            self._under_way[key] = look
            look.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(look)  # who leaves takes nothing from the others

    def _forget(self, key: tuple[str, int, int], done: asyncio.Task[Bulletin]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # whoever waits is told; perhaps nobody does any more

    def _look(self, job_id: str, sequence: int) -> Bulletin:
        news = self._events.news(job_id, sequence, _BATCH)
        lines = []
        for event in news.events:
            data = json.dumps(event_object(event).model_dump(mode="json"))
            lines.append(format_sse_event(data_str=data, id=event.id))
        last = news.events[-1].sequence if news.events else sequence
        return Bulletin(b"".join(lines), last, len(news.events) == _BATCH, news.is_over)
