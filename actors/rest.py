"""When engines that share a GPU with a trainer are awake: while somebody needs them, and not a moment longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Call = Callable[[str], Awaitable[None]]  # `sleep` or `wake` on every engine


class Rest:
    """Counts who needs the engines. The first wakes them, the last lets them sleep."""

    def __init__(self, call: Call, *, sleeps: bool) -> None:
        """`call` returns when all have done it; `sleeps` False: they are always awake, and nothing is called."""
        self._call = call
        self._sleeps = sleeps
        self._asleep = False
        self._users = 0
        self._lock = asyncio.Lock()

    async def enter(self) -> None:
        """Returns when engines are awake; they stay so until `leave`."""
        async with self._lock:
            if self._asleep:
                await self._call("wake")
                self._asleep = False
            self._users += 1

    async def leave(self) -> None:
        async with self._lock:
            self._users -= 1
            if self._sleeps and self._users == 0 and not self._asleep:
                await self._call("sleep")
                self._asleep = True

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Within it engines are awake."""
        await self.enter()
        try:
            yield
        finally:
            await self.leave()
