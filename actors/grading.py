"""The grader of a job that writes samples, with the workers and endpoints it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.reward_model import ClassifierPool, RewardModelSpec
from modeseek_ray.config import JobConfig
from modeseek_ray.rewards import Grade, GradeItem, Grader, build_grader
from modeseek_ray.rewards.build import local_models
from modeseek_ray.rewards.endpoints import Endpoint

if TYPE_CHECKING:
    from actors.placement import Placement


@dataclass(frozen=True)
class Grading:
    """What a job's grader is made of. `classifiers` has one entry for each local model it names."""

    config: JobConfig
    endpoints: tuple[Endpoint, ...]
    classifiers: tuple[RewardModelSpec, ...]

    @classmethod
    def of(cls, config: JobConfig, endpoints: Sequence[Endpoint], judges: Mapping[str, Path]) -> Grading:
        """`judges`: where the local classifiers lie, by the names the job calls them (`playground/…`, `ft:…`).

        Raises `ConfigError` for a judge the operator does not allow.
        """
        resources = config.resources
        param = f"method.{config.method.type}.grader"
        sections = [section for _, section in local_models(config.grader, endpoints=endpoints, param=param)]
        specs = [
            RewardModelSpec(
                model_path=str(judges[section.model]),
                name=section.model,
                label=section.label,
                cpus_per_worker=resources.cpus_per_worker,
                gpus_per_worker=resources.gpus_per_worker,
            )
            for section in sections
        ]
        return cls(config, tuple(endpoints), tuple(dict.fromkeys(specs)))

    @property
    def num_workers(self) -> int:
        """Of each classifier."""
        return self.config.resources.scorers

    def seats(self) -> list[RewardModelSpec]:
        """One entry a worker, in the order in which `start` asks for them."""
        return [spec for spec in self.classifiers for _ in range(self.num_workers)]

    async def start(self, placement: Placement) -> Grader:
        """Load what has to be loaded; close the grader when done. Await after `placement.reserve`."""
        if not self.classifiers:
            return build_grader(self.config.grader, endpoints=self.endpoints)
        pool = await placement.classifiers(self.classifiers, self.num_workers)
        await pool.setup()
        return _WithPool(build_grader(self.config.grader, endpoints=self.endpoints, classifier=pool), pool)


class _WithPool:
    """A grader that ends its workers when it is closed."""

    def __init__(self, grader: Grader, pool: ClassifierPool) -> None:
        self._grader, self._pool = grader, pool

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return await self._grader.grade(items)

    async def close(self) -> None:
        await self._grader.close()
        await self._pool.close()
