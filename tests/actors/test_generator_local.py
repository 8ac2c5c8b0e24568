"""A trainer and an engine in one process, for a debugger: they share torch's process group and part in peace."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.generator import GeneratorSpec, Sampling
from actors.local import LocalPlacement
from actors.sources import probe_groups
from actors.trainer import TrainerSpec
from actors.weight_sync import VerifiedChannel
from modeseek_ray.config import Resources, Training
from modeseek_ray.errors import ConfigError
from modeseek_ray.types import Objective, Prompt, StepPlan
from tests.actors.conftest import random_samples

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_trainer_goes_on_after_the_engine_beside_it_was_closed(
    vllm_moe: Path, forks: dict[str, str]
) -> None:
    """In a process of its own: vLLM changes torch for all that comes later."""
    command = [sys.executable, "-m", "tests.actors.test_generator_local", str(vllm_moe)]
    environment = {**os.environ, **forks}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["largest"] < 1e-4
    assert found["versions"] == [0, 1]
    first, second, third = found["losses"]
    assert third < second < first


def test_one_process_holds_one_engine() -> None:
    with pytest.raises(ConfigError, match="one generator") as refused:
        asyncio.run(LocalPlacement().generators(GeneratorSpec(model_path="-"), 2))
    assert refused.value.param == "resources.generators"


async def together(model: str) -> None:
    placement = LocalPlacement()
    spec = GeneratorSpec(
        model_path=model, sampling=Sampling(max_tokens=8), max_length=64, kv_cache_gib=0.1, with_routes=True
    )
    await placement.reserve(trainers=1, generators=1, generator=spec)
    trainer = await placement.trainers(
        TrainerSpec(model, Objective(), Training(), Resources(zero_stage=2), seed=0), 1
    )
    pool = await placement.generators(spec, 1)
    await trainer.setup()
    await pool.setup()
    prompts = [Prompt(i, np.arange(5 + i, 15 + i, dtype=np.int32)) for i in range(4)]
    channel = VerifiedChannel(trainer, pool, [p.token_ids_T for p in prompts])
    await channel.verify()
    groups = probe_groups(random_samples(8), placement.put)

    async def step(number: int) -> float:
        plan = StepPlan(step=number, values_N=np.ones(8), denominator=50.0, learning_rate=1e-2)
        return (await trainer.step(groups, plan)).loss

    before = await pool.sample(prompts, round_=0)
    losses = [await step(0)]
    figures = await channel.sync(1)
    after = await pool.sample(prompts, round_=1)
    losses.append(await step(1))
    await pool.close()
    losses.append(await step(2))
    await trainer.close()
    await placement.close()
    versions = sorted({c.weight_version for cs in [*before, *after] for c in cs})
    print(
        json.dumps(
            {"losses": losses, "versions": versions, "largest": figures["sync_largest_difference_nats"]}
        )
    )


if __name__ == "__main__":
    asyncio.run(together(sys.argv[1]))
