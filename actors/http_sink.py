"""Events, heartbeats and checkpoints to the service, from a process that outlives its absences.

Events are spooled to disk before they are sent and sent again until acknowledged, numbered per
attempt, so that the service sees each exactly once and in order. What a driver that dies had not
delivered, the service reads from its spool (`jobs/spool.py`). The lease is renewed by the heartbeat;
a driver that cannot renew it stops itself when it runs out, because another may have been started. A
spool that cannot be written (a full disk) costs nothing while this process lives.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.roles import Desired
from modeseek_ray.client import AttemptClient, finite
from modeseek_ray.errors import ModeseekError, ServiceError

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0  # also how soon a cancel is seen
FLUSH_S = 0.3
RETRY_S = 1.0
LEASE_S = 60.0
BATCH = 500
MAX_MESSAGE = 10_000  # characters; the service takes ten times as many
_REFUSED = "refused_event"
_CONTENT_REFUSED = (400, 413, 422)  # by HTTP status: sent again, it would be refused again


class LeaseLost(ModeseekError):
    """The service gave this job to another attempt, or could not be reached for a whole lease."""

    code = "lease_lost"


class HttpSink:
    """`journal.Sink` over HTTP. `start` after construction, `close` at the end."""

    def __init__(self, client: AttemptClient, spool: Path, *, lease_s: float = LEASE_S) -> None:
        """`lease_s`: how long the service lets a driver be silent."""
        self._client = client
        self._lease_s = lease_s
        self._spool = spool.open("a", encoding="utf-8")
        self._pending: deque[dict[str, Any]] = deque()
        self._next_seq = 1
        self._status: Mapping[str, Any] = {}
        self._committed: list[Path] = []  # checkpoints that the service lists
        self._wanted: Desired = "run"
        self._renewed = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = asyncio.Event()

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(work())
            for work in (self._flush_forever, self._beat_forever, self._watch_lease)
        ]

    def emit(self, event: Mapping[str, Any]) -> None:
        """Whatever an event holds, it costs the job nothing: JSON has no NaN, a text may be endless."""
        numbered = _sendable({"seq": self._next_seq, **event})
        self._next_seq += 1
        with suppress(OSError):
            self._spool.write(json.dumps(numbered) + "\n")
            self._spool.flush()
        self._pending.append(numbered)

    def beat(self, status: Mapping[str, Any]) -> None:
        self._status = status

    @property
    def section(self) -> str | None:
        """What the work says it is at."""
        return self._status.get("section")

    def desired(self) -> Desired:
        return self._wanted

    async def lost(self) -> None:
        """Returns when the lease is gone. Await beside the work, and stop the work when it returns."""
        await self._lost.wait()

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None:
        """Commit in the store. Events before it are delivered first, so that history stays in order."""
        await self._until_answered(self.flush)
        await self._until_answered(self._client.checkpoint, step, str(directory), dict(metrics))
        self._committed.append(directory)
        for older in [path for path in self._committed if not path.exists()]:
            await self._until_answered(self._client.prune, str(older))
            self._committed.remove(older)

    async def forget(self, checkpoints: Sequence[Path]) -> None:
        """Have the service list these no more, before their files go."""
        for path in checkpoints:
            await self._until_answered(self._client.prune, str(path))
            if path in self._committed:
                self._committed.remove(path)

    def know(self, committed: Sequence[Path]) -> None:
        """Checkpoints that earlier attempts have committed: said to be gone when they are."""
        self._committed = list(committed)

    async def running(self) -> None:
        await self.transition("running")

    async def transition(self, to: str, **details: Any) -> None:
        """A change of state. Delivered, or the lease is lost."""
        await self._until_answered(self.flush)
        await self._until_answered(self._client.transition, to, **details)

    async def delivered(self) -> None:
        """Returns when the service has all that was emitted, or raises `LeaseLost`."""
        await self._until_answered(self.flush)

    async def flush(self) -> None:
        """Send what is pending; keep it until it is acknowledged.

        An event whose content the service refuses is looked for by halving the batch. A warning takes its
        place, under its number: numbers have no gap.
        """
        size = BATCH
        while self._pending:
            batch = [self._pending[i] for i in range(min(size, len(self._pending)))]
            try:
                acknowledged = await self._client.events(batch)
            except ServiceError as error:
                if error.http_status not in _CONTENT_REFUSED or _REFUSED in batch[0]["data"]:
                    raise
                size = max(1, len(batch) // 2)
                if len(batch) == 1:
                    self._replace(batch[0], error)
                continue
            size = BATCH
            while self._pending and self._pending[0]["seq"] <= acknowledged:
                self._pending.popleft()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(OSError):
            self._spool.close()

    def _replace(self, event: Mapping[str, Any], error: ServiceError) -> None:
        log.warning("the service refuses event %d: %s", event["seq"], error)
        if self._pending and self._pending[0] is event:  # else another flush was faster
            text = (
                f"An event could not be delivered: {error.message[:500]} It is in the attempt's spool.jsonl."
            )
            substitute = {"type": "message", "level": "warn", "message": text, "data": {_REFUSED: True}}
            self._pending[0] = {"seq": event["seq"], "created_at": event.get("created_at"), **substitute}

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except ServiceError as error:
                self._note(error)

    async def _beat_forever(self) -> None:
        while True:
            asked = time.monotonic()  # the service counts from when it heard, which is later
            try:
                self._wanted = await self._client.heartbeat(dict(self._status))
                self._renewed = asked
            except ServiceError as error:
                self._note(error)
            await asyncio.sleep(min(HEARTBEAT_S, self._lease_s / 5))

    async def _watch_lease(self) -> None:
        """A request may hang longer than the lease lasts; so the clock is watched beside it.

        Counted from when the newest heartbeat was asked, which is before the service counts.
        """
        while (left_s := self._renewed + self._lease_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        self._lost.set()

    async def _until_answered(self, call: Any, *args: Any, **details: Any) -> None:
        """Retry while the service is away; a refusal is final."""
        while True:
            try:
                await call(*args, **details)
                return
            except ServiceError as error:
                self._note(error)
                if self._lost.is_set() or 400 <= error.http_status < 500:
                    raise LeaseLost(str(error)) from error
            await asyncio.sleep(RETRY_S)

    def _note(self, error: ServiceError) -> None:
        """A stale fence is final; silence is final once the lease has run out."""
        if error.code == "stale_fence" or time.monotonic() - self._renewed > self._lease_s:
            self._lost.set()


def _sendable(event: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON that the service reads: no NaN, no half characters, nothing that is not JSON, no book."""
    plain = json.dumps(finite(event), default=str, ensure_ascii=False)
    clean: dict[str, Any] = json.loads(plain.encode("utf-8", "replace"))
    text = str(clean.get("message", ""))
    if len(text) > MAX_MESSAGE:
        clean["message"] = f"{text[:MAX_MESSAGE]} … ({len(text) - MAX_MESSAGE} more characters)"
    return {**clean, "data": clean.get("data", {})}
