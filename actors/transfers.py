"""How weights travel from the trainer to the engines, behind one protocol: through memory, or between GPUs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any, Protocol

from actors.generator_pool import GeneratorPool
from actors.weight_chunks import ChunkFacts, WeightRelease


class Lender(Protocol):
    """The trainer, as `MemoryTransfer` sees it (`pools.TrainerPool`)."""

    async def weights(self) -> tuple[list[Any], ChunkFacts]: ...


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

    def __init__(self, trainer: Lender, generator: GeneratorPool) -> None:
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
