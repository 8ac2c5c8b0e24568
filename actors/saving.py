"""Saving a checkpoint: the ranks write, then it is sealed and committed, here or while training goes on.

The ranks' shards are written before the next step, which changes the tensors. Hashing them, flushing
them to the disk, the rename and the commit take longer and need nothing of the ranks: with
`background` they happen beside the next steps, one checkpoint at a time. What is saved is the same;
a crash in between goes back one checkpoint further.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.roles import Journal, Trainer


class Checkpoints(Protocol):
    """Where checkpoints are kept: complete or not at all (`checkpoint.py`)."""

    def begin(self, step: int, attempt: int) -> Path: ...

    def finish(self, directory: Path, controller: Mapping[str, Any]) -> Path: ...

    def surplus(self) -> list[Path]: ...

    def remove(self, surplus: Sequence[Path]) -> None: ...

    def latest(self) -> Path | None: ...

    def read_controller(self, directory: Path) -> dict[str, Any]: ...


class Saver:
    """Saves for one attempt. `settle` before anything relies on the last checkpoint."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        trainer: Trainer,
        journal: Journal,
        attempt: int,
        *,
        background: bool = False,
    ) -> None:
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._journal = journal
        self._attempt = attempt
        self._background = background
        self._sealing: asyncio.Task[None] | None = None
        self._sealed: int | None = None  # the step whose checkpoint this attempt committed last

    async def save(
        self, state: Mapping[str, Any], metrics: Mapping[str, float], *, last: bool = False
    ) -> None:
        """Write a checkpoint of `state["step"]`. The `last` one is committed on return in any case.

        A step that is committed already (a pause right after a checkpoint was due) is not written again: the
        second would have to take the first one's name, and a crash between the two would lose both.

        Raises what the one before raised in the background.
        """
        await self._journal.section("checkpoint", deadline_s=1800)
        await self.settle()
        if state["step"] == self._sealed:
            return
        directory = self._checkpoints.begin(state["step"], self._attempt)
        await self._trainer.save(directory)
        self._sealing = asyncio.create_task(self._seal(directory, copy.deepcopy(dict(state)), metrics))
        if last or not self._background:
            await self.settle()

    async def settle(self) -> None:
        """Return when the last checkpoint is committed. Raises what went wrong with it."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            await sealing

    async def notice(self) -> None:
        """Raise what went wrong in the background, if that is known by now."""
        if self._sealing is not None and self._sealing.done():
            await self.settle()

    def drop(self) -> None:
        """The attempt has ended otherwise: nobody waits for it any more."""
        if self._sealing is not None:
            self._sealing.cancel()

    async def _seal(self, directory: Path, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Manifest last, rename, and only then the commit in the store. Older ones go from there first."""
        finished = await asyncio.to_thread(self._checkpoints.finish, directory, state)
        await self._journal.checkpoint(state["step"], finished, metrics)
        surplus = self._checkpoints.surplus()
        await self._journal.forget(surplus)
        await asyncio.to_thread(self._checkpoints.remove, surplus)
        self._sealed = state["step"]
