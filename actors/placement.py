"""What a job asks of the place where its workers run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from actors.generator import GeneratorSpec
from actors.generator_pool import GeneratorPool
from actors.pools import TrainerPool
from actors.reward_model import ClassifierPool, RewardModelSpec
from actors.scorers import ScorerPool
from actors.scoring import ScoringSpec
from actors.trainer import TrainerSpec


class Placement(Protocol):
    """Where workers run: this process (`local.py`) or a Ray cluster (`cluster.py`)."""

    on_ray: bool

    def put(self, block: Any) -> Any: ...

    async def reserve(
        self,
        *,
        trainers: int,
        generators: int = 0,
        generator: GeneratorSpec | None = None,
        scorers: int = 0,
        classifiers: Sequence[RewardModelSpec] = (),
    ) -> None:
        """Room for all of a job's workers at once, before the first of them starts."""
        ...

    async def trainers(self, spec: TrainerSpec, count: int) -> TrainerPool: ...

    async def generators(self, spec: GeneratorSpec, count: int) -> GeneratorPool: ...

    async def meeting(self) -> tuple[str, int]:
        """Address of trainer rank 0's node and a free port there. Await `trainers` before."""
        ...

    async def scorers(self, spec: ScoringSpec, count: int) -> ScorerPool: ...

    async def classifiers(self, specs: Sequence[RewardModelSpec], count: int) -> ClassifierPool: ...

    async def close(self) -> None: ...
