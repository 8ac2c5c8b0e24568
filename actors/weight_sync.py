"""Trainer to engines: a versioned channel, all or nothing, believed only after both sides agree.

An update that loads without an error may still be wrong: experts left in another layout than the
kernel reads (vLLM 0.30 on the CPU does that), a name that was skipped, a cast. So after each one the
same few sequences, the canary, are scored by the trainer and by every engine, and the job stops if
they differ.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.generator_pool import GeneratorPool
from actors.weight_chunks import ChunkFacts, WeightRelease
from modeseek_ray.errors import NumericsError

CANARY_SEQUENCES = 8
CANARY_TOKENS = 32  # of each, at most
# After a sync fewer do, because scoring many costs several times what moving the weights does: every weight
# of a dense model is asked by any token. They are other ones each time.
SYNC_TOKENS = 32
SYNC_LENGTH = 16  # of one sequence: few long ones are cheaper than many short ones


@dataclass(frozen=True)
class Tolerance:
    """How far the log-probabilities of one token may be apart on the two engines, nats."""

    largest: float
    mean: float


# In float32 both sides agree to about 1e-6. In bfloat16 every operation rounds, and a router that
# rounds to another expert moves single tokens by 1e-1: only the mean says something.
TOLERANCE = {
    "float32": Tolerance(largest=1e-4, mean=1e-4),
    "bfloat16": Tolerance(largest=2.0, mean=5e-2),
}


class WeightOwner(Protocol):
    """The trainer, as the channel sees it (`pools.TrainerPool`)."""

    async def weights(self) -> tuple[list[Any], ChunkFacts]: ...

    async def canary(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]: ...


class Transfer(Protocol):
    """How the bytes travel, in two halves."""

    async def gather(self, version: int) -> Any:
        """What can be done while engines still write. Nothing has changed if this fails."""
        ...

    async def load(self, gathered: Any, version: int) -> int:
        """Into every engine, all of which are held. Returns the bytes of one copy."""
        ...


class MemoryTransfer:
    """Through memory: Ray's object store, or plain objects in one process. Engines that die are brought along."""

    def __init__(self, trainer: WeightOwner, generator: GeneratorPool) -> None:
        self._trainer = trainer
        self._generator = generator

    async def gather(self, version: int) -> WeightRelease:
        return WeightRelease.of(version, *await self._trainer.weights())

    async def load(self, gathered: WeightRelease, version: int) -> int:
        await self._generator.install(gathered)
        return gathered.facts.num_bytes


class NcclTransfer:
    """From GPU to GPU by vLLM's NCCL engine (`nccl_transfer`). Not yet run: it needs CUDA.

    The group of senders and receivers is fixed when it is made, so an engine that dies ends the
    attempt, and the next begins from a checkpoint: give the pool no replacements.
    """

    def __init__(self, trainer: Any, generator: GeneratorPool, address: str, port: int) -> None:
        """`address`, `port`: where trainer rank 0 listens, free on its node."""
        self._trainer = trainer
        self._generator = generator
        self._meeting = {"master_address": address, "master_port": port}
        self._description: Mapping[str, Any] | None = None

    async def gather(self, version: int) -> None:
        """Nothing: the broadcast gathers as it goes."""

    async def load(self, gathered: None, version: int) -> int:
        call_all = self._generator.call_all
        if self._description is None:
            self._description = await self._connect()
        await call_all("native", "start_weight_update", {})
        update = {"request": {"update_info": dict(self._description)}}
        # Both sides meet inside the same NCCL calls.
        await asyncio.gather(self._trainer.send_weights(), call_all("native", "update_weights", update))
        await call_all("native", "finish_weight_update", {"weight_version": str(version)})
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
        pairs = zip(self._description["shapes"], self._description["dtype_names"], strict=True)
        return sum(math.prod(shape) * sizes.get(dtype, 1) for shape, dtype in pairs)

    async def _connect(self) -> Mapping[str, Any]:
        width = self._generator.spec.tensor_parallel
        world_size = 1 + width * self._generator.count
        meeting = {**self._meeting, "world_size": world_size, "packed": True}
        requests = [
            (
                "init_weight_transfer_engine",
                {"request": {"init_info": {**meeting, "rank_offset": 1 + width * i}}},
            )
            for i in range(self._generator.count)
        ]
        await asyncio.gather(
            self._trainer.join_transfer(*self._meeting.values(), world_size),
            self._generator.call_each("native", requests),
        )
        description: Mapping[str, Any] = await self._trainer.describe_transfer()
        return description


class VerifiedChannel:
    """`roles.WeightChannel`. Two halves and a proof: gather, load, compare.

    The first proof (`verify`) is by the first `CANARY_SEQUENCES` sequences; those after a sync by a few tokens of
    the others, in turn.
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
    ) -> None:
        """`canary`: token sequences, at best of the job's own prompts. `trainer_dtype`: None = the engines'.
        `tolerance`: None = `TOLERANCE` of whichever of both dtypes is coarser. `sync_tokens`: about how many
        tokens prove a sync (`tokens_to_reach`).

        `transfer`: None = through memory, which works everywhere.

        `in_flight`: requests being written when an update comes are finished by the old weights, or
        begun again with the new. They are never continued: no completion is of two versions.
        """
        self._trainer = trainer
        self._generator = generator
        self._canary = cut_canary(canary, generator.spec.max_length)
        self._bank = cut_canary(canary, generator.spec.max_length, count=len(canary), num_tokens=SYNC_LENGTH)
        self._sync_tokens = sync_tokens
        dtypes = {generator.spec.dtype, trainer_dtype or generator.spec.dtype}
        self._tolerance = tolerance or TOLERANCE["bfloat16" if "bfloat16" in dtypes else "float32"]
        self._in_flight = in_flight
        self._transfer = transfer or MemoryTransfer(trainer, generator)

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
            "sync_bytes": float(num_bytes),
            "sync_engines_replaced": float(self._generator.num_replaced - replaced),
        }

    async def verify(self) -> Mapping[str, float]:
        """Compare trainer and engines as they are, for instance before the first step."""
        await self._generator.hold()
        version = self._generator.version
        try:
            figures = await self._compare(self._canary, self._trainer.canary(self._canary), version)
        except BaseException as error:
            await self._generator.refuse(error)
            raise
        await self._generator.release(version)
        return figures

    async def _compare(
        self,
        canary: Sequence[NDArray[np.int32]],
        expected: Awaitable[list[NDArray[np.float64]]],
        version: int,
    ) -> Mapping[str, float]:
        """What the trainer says with what every engine says. Raises `NumericsError` with both numbers."""
        ours, answers = await asyncio.gather(expected, self._generator.score(canary))
        return compare(ours, answers, self._tolerance, version)


def cut_canary(
    sequences: Sequence[NDArray[np.int32]],
    max_length: int,
    *,
    count: int = CANARY_SEQUENCES,
    num_tokens: int = CANARY_TOKENS,
) -> list[NDArray[np.int32]]:
    """The first few sequences of at least two tokens, cut: an engine wants room for one token more."""
    length = min(num_tokens, max_length - 1)
    cut = [np.asarray(s[:length], dtype=np.int32) for s in sequences if len(s) >= 2]
    if not cut:
        raise ValueError("the canary needs a sequence of two tokens or more")
    return cut[:count]


def in_turn(bank: Sequence[NDArray[np.int32]], turn: int, num_tokens: int) -> list[NDArray[np.int32]]:
    """So many sequences of the bank that they have `num_tokens` (or all of it), each turn the next ones.

    >>> bank = [np.full(3, i, dtype=np.int32) for i in range(4)]
    >>> [int(s[0]) for s in in_turn(bank, 0, 5)], [int(s[0]) for s in in_turn(bank, 3, 5)]
    ([0, 1], [2, 3])
    """
    count = min(len(bank), -(-num_tokens // max(len(s) for s in bank)))
    return [bank[(turn * count + i) % len(bank)] for i in range(count)]


def tokens_to_reach(num_experts: int) -> int:
    """Tokens of a canary that asks every expert four times if its router chooses two a token, evenly.

    >>> tokens_to_reach(0), tokens_to_reach(8), tokens_to_reach(64), tokens_to_reach(512)
    (32, 32, 128, 256)
    """
    return min(max(SYNC_TOKENS, 2 * num_experts), CANARY_SEQUENCES * CANARY_TOKENS)


def compare(
    expected: Sequence[NDArray[np.float64]],
    answers: Sequence[Sequence[NDArray[np.float64]]],
    tolerance: Tolerance,
    version: int,
) -> dict[str, float]:
    """`expected[s][t]` of the trainer with `answers[e][s][t]` of each engine. Raises `NumericsError`."""
    largest = mean = 0.0
    ours = np.concatenate(expected)
    place = [(s, t) for s, log_prob_T in enumerate(expected) for t in range(1, len(log_prob_T) + 1)]
    for engine, answer in enumerate(answers):
        theirs = np.concatenate(answer)
        if len(theirs) != len(ours):
            raise RuntimeError(f"engine {engine} scored {len(theirs)} canary tokens of {len(ours)}")
        off = np.where(np.isfinite(ours) & np.isfinite(theirs), np.abs(theirs - ours), np.inf)
        worst = int(off.argmax())
        if not (off[worst] <= tolerance.largest and off.mean() <= tolerance.mean):
            sequence, token = place[worst]
            raise NumericsError(
                f"weights of version {version} are not the same on both sides: token {token} of canary"
                f" {sequence} has a log-probability of {ours[worst]:.6f} in the trainer and"
                f" {theirs[worst]:.6f} in engine {engine}, {off[worst]:.2e} nats apart; {off.mean():.2e} on"
                f" average (allowed: {tolerance.largest:.0e} and {tolerance.mean:.0e}).",
                mend="The update did not give the engine the trainer's model: report this, with the"
                " model's architecture. The last checkpoint is intact.",
            )
        largest, mean = max(largest, float(off[worst])), max(mean, float(off.mean()))
    return {"sync_largest_difference_nats": largest, "sync_mean_difference_nats": mean}


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
