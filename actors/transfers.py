"""How weights travel from the trainer to the engines, behind one protocol: by memory, between GPUs or within one."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping
from typing import Any, Protocol

from actors.generator_pool import GeneratorPool
from actors.weight_chunks import ChunkFacts, WeightRelease
from modeseek_ray.errors import ConfigError


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


class IpcTransfer:
    """Within each GPU, by vLLM's IPC engine, to engines beside trainers (`ipc_transfer`). Not yet run: it needs CUDA.

    An engine that is started anew has no weights to be brought to, so one that dies ends the attempt.
    """

    def __init__(self, trainer: Any, generator: GeneratorPool) -> None:
        self._trainer = trainer
        self._generator = generator
        self._cards: list[str] = []

    async def gather(self, version: int) -> None:
        """Nothing: each layer is gathered as it is lent."""

    async def load(self, gathered: None, version: int) -> int:
        call_all = self._generator.call_all
        if not self._cards:
            self._cards = await self._connect()
        num_bytes = 0
        try:
            await call_all("native", "start_weight_update", {})
            for layer in itertools.count():
                update = await self._trainer.lend_weights(layer, self._cards)
                if update is None:
                    break
                num_bytes += sum(update["tensor_sizes"])
                await call_all("native", "update_weights", {"request": {"update_info": dict(update)}})
            await call_all("native", "finish_weight_update", {"weight_version": str(version)})
        finally:
            await self._trainer.take_weights_back()
        return num_bytes

    async def _connect(self) -> list[str]:
        """The engines' GPUs. Raises `ConfigError` for an engine on one that no trainer is on."""
        lent, cards = await asyncio.gather(self._trainer.cards(), self._generator.call_all("card"))
        for engine, name in enumerate(cards):
            if name not in lent:
                raise ConfigError(
                    f"weight_transfer ipc stays within a GPU, and engine {engine} is on {name}, where no trainer"
                    f" is: they are on {', '.join(lent)}.",
                    param="resources.weight_transfer",
                    mend="Set it to object_store, and look at how the cluster's nodes name their GPUs"
                    " (CUDA_VISIBLE_DEVICES, MIG): resources.colocated reserves both on one.",
                )
        await self._generator.call_all(
            "native", "init_weight_transfer_engine", {"request": {"init_info": {"packed": True}}}
        )
        return list(cards)
