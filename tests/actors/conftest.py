"""Processes and samples that the trainer's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.generator import Sampling
from actors.trainer import TrainerSpec
from modeseek_ray.config import Resources, Training
from modeseek_ray.types import Objective, Sample
from tests.actors.engines import Engine, Engines
from tests.actors.ranks import Ranks, Start, Trainer


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes for trainer ranks."""
    processes = Ranks()
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def engines(ray_cluster: Any) -> Iterator[Engines]:
    """vLLM engines, started when a test first asks for them."""
    engines = Engines(ray_cluster)
    yield engines
    engines.stop()


@pytest.fixture(scope="session")
def moe_engine(engines: Engines, vllm_moe: Path) -> Engine:
    """Samples twice a prompt at temperature 0.7, with routes."""
    sampling = Sampling(samples_per_prompt=2, temperature=0.7, max_tokens=24)
    return engines.of(vllm_moe, sampling=sampling, with_routes=True)


@pytest.fixture(scope="session")
def dense_engine(engines: Engines, vllm_dense: Path) -> Engine:
    """Samples four times a prompt at temperature one, until an `e` is written."""
    return engines.of(vllm_dense, sampling=Sampling(samples_per_prompt=4, max_tokens=40, stop=("e",)))


@pytest.fixture
def start(ranks: Ranks, tiny_dense: Path) -> Iterator[Start]:
    """Start a trainer; the last one is closed first. Keywords are resources, except the named ones."""
    running: list[Trainer] = []

    def begin(
        *,
        model: Path = tiny_dense,
        world_size: int = 1,
        objective: Objective = Objective(),  # noqa: B008
        training: Training = Training(),  # noqa: B008
        compare_routes: bool = False,
        **resources: Any,
    ) -> Trainer:
        for trainer in running:
            trainer.close()
        running.clear()
        defaults = {"trainers": world_size, "zero_stage": 2, "micro_batch_size": 2}
        spec = TrainerSpec(
            model_path=str(model),
            objective=objective,
            training=training,
            resources=Resources(**{**defaults, **resources}),
            seed=0,
            persistence_threshold=0,
            compare_routes=compare_routes,
        )
        running.append(ranks.start(spec, world_size))
        return running[0]

    yield begin
    for trainer in running:
        trainer.close()


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Eight samples of 5 to 19 tokens; the second half of each is trained on."""
    return random_samples(8)


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        length = int(rng.integers(5, 20))
        trained_T = np.arange(length) >= length // 2
        token_ids_T = rng.integers(5, 200, length).astype(np.int32)
        made.append(Sample(row=row, token_ids_T=token_ids_T, trained_T=trained_T, problem=row))
    return made
