"""The same worker classes in this process: for a debugger, and for `modeseek run --local`.

Each worker gets one thread of its own, so that its calls run in order and the event loop stays
free. One trainer rank is all a process can hold (torch.distributed has one process group).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.generator_pool import GeneratorPool
from actors.network import free_port
from actors.pools import TrainerPool
from actors.scorers import ScorerPool
from modeseek_ray.data.batching import deal
from modeseek_ray.errors import ConfigError

if TYPE_CHECKING:
    from actors.generator import GeneratorSpec
    from actors.reference import ScoringSpec
    from actors.reward_model import ClassifierPool, RewardModelSpec
    from actors.trainer import TrainerSpec


_END = object()


class LocalWorker:
    """An object in this process behind the same `call` as a Ray actor."""

    copies_stream = False  # things are handed on as they are

    def __init__(self, build: Callable[[], Any], name: str) -> None:
        self._build = build
        self._object: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def call(self, method: str, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, method, args)

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """Each thing that `method`, a generator, yields."""
        loop = asyncio.get_running_loop()
        iterator = await self.call(method, *args)
        while (item := await loop.run_in_executor(self._thread, next, iterator, _END)) is not _END:
            yield item

    async def fetch(self, reference: Any) -> Any:
        """What `stream` gave is the thing itself."""
        return reference

    async def stop(self) -> None:
        if self._object is not None:
            await self.call("close")
        self._thread.shutdown(wait=False)

    def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._object is None:
            self._object = self._build()
        return getattr(self._object, method)(*args)


class LocalPlacement:
    """Workers as objects here. Blocks are handed on as they are."""

    on_ray = False

    def put(self, block: Any) -> Any:
        return block

    async def trainers(self, spec: TrainerSpec, count: int) -> TrainerPool:
        """One rank. Raises `ConfigError` for more: they need processes of their own."""
        from actors.trainer import TrainerRank

        if count != 1:
            raise ConfigError(
                f"--local has one trainer, the job asks for {count}.",
                param="resources.trainers",
                mend="Set it to 1, or leave out --local to start the ranks on Ray.",
            )
        worker = LocalWorker(lambda: TrainerRank(spec, 0, 1, "127.0.0.1", free_port()), "trainer")
        return TrainerPool([worker], deal)

    async def reserve(
        self,
        *,
        trainers: int,
        generators: int = 0,
        generator: GeneratorSpec | None = None,
        classifiers: Sequence[RewardModelSpec] = (),
        scorers: int = 0,
    ) -> None:
        """Nothing to reserve in one process."""

    async def meeting(self) -> tuple[str, int]:
        """See `RayPlacement.meeting`."""
        return "127.0.0.1", free_port()

    async def generators(self, spec: GeneratorSpec, count: int) -> GeneratorPool:
        """One engine. Set the trainer up before it: both share torch's process group in this process."""
        from actors.generator import GeneratorEngine

        if count != 1:
            raise ConfigError(
                f"--local has one generator, the job asks for {count}.",
                param="resources.generators",
                mend="Set it to 1, or leave out --local to start the engines on Ray.",
            )

        async def start(index: int) -> LocalWorker:
            return LocalWorker(lambda: GeneratorEngine(spec), f"generator-{index}")

        # What broke vLLM in this process is still in it: no second engine.
        return GeneratorPool(spec, start, count, max_replacements=0)

    async def classifiers(self, specs: Sequence[RewardModelSpec], count: int) -> ClassifierPool:
        """One worker a model, however many are asked for: a second would only share the same cores."""
        from actors.reward_model import ClassifierPool, RewardModel

        return ClassifierPool(
            {spec.key: [LocalWorker(partial(RewardModel, spec), "classifier")] for spec in specs}
        )

    async def scorers(self, spec: ScoringSpec, count: int) -> ScorerPool:
        """One frozen model, however many the job asks for: they would share this process's cores."""
        from actors.reference import ReferenceModel

        worker = LocalWorker(lambda: ReferenceModel(spec), "scorer")
        return ScorerPool([worker], spec.micro_batch_tokens, with_routes=spec.with_routes)

    async def close(self) -> None:
        """Nothing outlives the workers, which their pools stop."""
