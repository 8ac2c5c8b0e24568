"""Trainer to engines: a versioned channel, all or nothing, believed only after both sides agree.

An update that loads without an error may still be wrong: experts left in another layout than the
kernel reads (vLLM 0.30 on the CPU does that), a name that was skipped, a cast. So after each one the
same few sequences, the canary, are scored by the trainer and by every engine, and the job stops if
they differ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.agreement import FLOAT32_LIMIT, refuse_other_log_probs
from actors.canary import (
    BFLOAT16_TOKENS,
    FLOAT32,
    SYNC_LENGTH,
    SYNC_TOKENS,
    UNMEASURED,
    Tolerance,
    compare,
    cut_canary,
    in_turn,
)
from actors.generator_pool import GeneratorPool
from actors.transfers import MemoryTransfer, Transfer
from actors.weight_chunks import ChunkFacts
from modeseek_ray.types import Group


class WeightOwner(Protocol):
    """The trainer, as the channel sees it (`pools.TrainerPool`)."""

    async def weights(self) -> tuple[list[Any], ChunkFacts]: ...

    async def canary(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]: ...


class VerifiedChannel:
    """`roles.WeightChannel`. Two halves and a proof: gather, load, compare.

    The first proof (`verify`) is by the first `CANARY_SEQUENCES` sequences; those after a sync by a few tokens of
    the others, in turn. In bfloat16 the first one also measures what those after it go by.
    """

    def __init__(
        self,
        trainer: WeightOwner,
        generator: GeneratorPool,
        canary: Sequence[NDArray[np.int32]],
        *,
        trainer_dtype: str | None = None,
        tolerance: Tolerance | None = None,
        in_flight: Literal["drain", "restart"] = "drain",
        transfer: Transfer | None = None,
        sync_tokens: int = SYNC_TOKENS,
        holds_samples: bool = True,
    ) -> None:
        """`canary`: token sequences, at best of the job's own prompts. `trainer_dtype`: None = the engines'.
        `tolerance`: None = 1e-4 nats in float32; where one of both dtypes is coarser, a few times the difference
        that `verify` finds. `sync_tokens`: about how many tokens prove a sync in float32 (`tokens_to_reach`).

        `holds_samples`: whether `compare_samples` compares; a job that corrects for a mismatch expects one.

        `transfer`: None = through memory, which works everywhere.

        `in_flight`: requests being written when an update comes are finished by the old weights, or
        begun again with the new. They are never continued: no completion is of two versions.
        """
        self._trainer = trainer
        self._generator = generator
        self._canary = cut_canary(canary, generator.spec.max_length)
        self._bank = cut_canary(canary, generator.spec.max_length, count=len(canary), num_tokens=SYNC_LENGTH)
        rounds = "bfloat16" in {generator.spec.dtype, trainer_dtype or generator.spec.dtype}
        self._sync_tokens = sync_tokens * (BFLOAT16_TOKENS if rounds else 1)
        self._calibrates = rounds and tolerance is None
        self._tolerance = tolerance or (UNMEASURED if rounds else FLOAT32)
        self._rounds = rounds
        self._holds_samples = holds_samples
        self._in_flight = in_flight
        self._transfer = transfer or MemoryTransfer(trainer, generator)

    @property
    def tolerance(self) -> Tolerance:
        """What the next sync is held to."""
        return self._tolerance

    async def sync(self, version: int) -> Mapping[str, float]:
        """See `roles.WeightChannel`. Await before the next optimizer step.

        The weights are gathered while requests in flight end; nothing has changed until both are done.
        Then either all engines write with the new weights, or none writes any more.
        """
        if version <= self._generator.version:
            raise ValueError(f"version {version} is not newer than {self._generator.version}")
        clock = _Clock()
        replaced = self._generator.num_replaced
        draining = asyncio.ensure_future(clock.measure("drain", self._generator.hold(self._in_flight)))
        try:
            gathered = await clock.measure("gather", self._transfer.gather(version))
            await draining
        except BaseException:
            draining.cancel()
            await self._generator.release(self._generator.version)
            raise
        canary = in_turn(self._bank, version, self._sync_tokens)
        loading = asyncio.ensure_future(clock.measure("load", self._transfer.load(gathered, version)))
        # Meanwhile the trainer has nothing else to do.
        expected = asyncio.ensure_future(self._trainer.canary(canary))
        try:
            num_bytes = await loading
            figures = await clock.measure("verify", self._compare(canary, expected, version))
        except BaseException as error:
            expected.cancel()
            await asyncio.gather(expected, return_exceptions=True)
            await self._generator.refuse(error)
            raise
        await self._generator.release(version)
        return {
            **figures,
            **clock.figures(),
            "sync_allowed_mean_nats": self._tolerance.mean,
            "sync_bytes": float(num_bytes),
            "sync_engines_replaced": float(self._generator.num_replaced - replaced),
        }

    async def verify(self) -> Mapping[str, float]:
        """Compare trainer and engines as they are. Await before the first step: both then have the model's own
        weights, so that what they differ by is rounding, which in bfloat16 becomes the measure of every sync.

        A resumed attempt begins with those same weights, too, and finds the same. Returns figures, among them
        what is allowed from now on.
        """
        await self._generator.hold()
        version = self._generator.version
        try:
            figures = await self._compare(self._canary, self._trainer.canary(self._canary), version)
        except BaseException as error:
            await self._generator.refuse(error)
            raise
        if self._calibrates:
            self._tolerance, self._calibrates = Tolerance.calibrated(figures), False
        await self._generator.release(version)
        return {**figures, **self._tolerance.figures()}

    def compare_samples(self, groups: Sequence[Group]) -> None:
        """See `roles.WeightChannel`. In bfloat16 by the measured tolerance, in units of the sampling temperature."""
        if not self._holds_samples:
            return
        sample = batch = FLOAT32_LIMIT
        if self._rounds:
            sharpness = 1 / min(1.0, self._generator.spec.sampling.temperature or 1.0)
            sample, batch = self._tolerance.largest * sharpness, self._tolerance.mean * sharpness
        refuse_other_log_probs(groups, self._generator.version, sample=sample, batch=batch)

    async def _compare(
        self,
        canary: Sequence[NDArray[np.int32]],
        expected: Awaitable[list[NDArray[np.float64]]],
        version: int,
    ) -> Mapping[str, float]:
        """What the trainer says with what every engine says. Raises `NumericsError` with both numbers."""
        ours, answers = await asyncio.gather(expected, self._generator.score(canary))
        return compare(ours, answers, self._tolerance, version)


class _Clock:
    """Seconds by part, and in all."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    async def measure(self, name: str, work: Any) -> Any:
        started = time.monotonic()
        try:
            return await work
        finally:
            self._seconds[name] = time.monotonic() - started

    def figures(self) -> dict[str, float]:
        parts = {f"sync_{name}_seconds": seconds for name, seconds in self._seconds.items()}
        return {**parts, "sync_seconds": time.monotonic() - self._started}
