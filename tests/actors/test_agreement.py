"""A round's samples under the weights that wrote them: the trainer's log-probabilities against the engine's."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from actors.agreement import FLOAT32_LIMIT, refuse_other_log_probs
from actors.canary import Tolerance
from actors.generator import GeneratorSpec, Sampling
from actors.generator_pool import GeneratorPool
from actors.weight_sync import VerifiedChannel
from modeseek_ray.errors import NumericsError
from modeseek_ray.types import Group, Handle
from tests.actors.test_generator_pool import World
from tests.actors.test_weight_sync import CANARY, FakeOwner


def group(trainer: list[float] | None, engine: list[float], version: int = 0, tokens: int = 4) -> Group:
    count = len(engine)
    return Group(
        prompt=0,
        row_N=np.arange(10, 10 + count),
        num_tokens_N=np.full(count, tokens),
        length_N=np.full(count, 2 * tokens),
        payload=Handle(block=None, index_N=np.arange(count)),
        log_policy_N=None if trainer is None else np.array(trainer),
        log_behavior_N=np.array(engine),
        weight_version_N=np.full(count, version),
    )


def check(*groups: Group, sample: float = FLOAT32_LIMIT, batch: float = FLOAT32_LIMIT) -> None:
    refuse_other_log_probs(groups, 0, sample=sample, batch=batch)


def test_samples_that_are_further_off_than_allowed_stop_the_job_with_both_numbers() -> None:
    check(group([-8.0, -9.003], [-8.0, -9.0]))  # .003 nats over four tokens
    with pytest.raises(
        NumericsError, match=r"row 11 the trainer says -9\.008000, .* said -9\.000000, 2\.00e-03"
    ):
        check(group([-8.0, -9.008], [-8.0, -9.0]))
    with pytest.raises(NumericsError, match="mismatch"):
        check(group([-8.0, math.nan], [-8.0, -9.0]))


def test_many_small_differences_say_more_than_one_large_one() -> None:
    """In bfloat16 a router that rounds to another expert moves one sample; a wrong update moves all."""
    check(
        group([-8.0, -8.0, -9.2], [-8.0, -8.0, -9.0]), sample=0.5, batch=0.02
    )  # .05 a token, .017 on average
    with pytest.raises(NumericsError, match=r"2\.50e-02 over 3 samples \(allowed: 5\.0e-01 and 2\.0e-02\)"):
        check(group([-8.1, -8.1, -9.1], [-8.0, -8.0, -9.0]), sample=0.5, batch=0.02)


def test_what_other_weights_wrote_nobody_scored_or_nobody_recorded_is_left_out() -> None:
    check(group([-5.0], [-9.0], version=-1), group(None, [-9.0]), group([-5.0], [math.nan]))
    check(group([-5.0], [-9.0], tokens=0))


async def test_the_channel_goes_by_its_dtype_its_temperature_and_what_the_job_corrects_itself() -> None:
    off = [group([-8.04], [-8.0])]  # .01 a token

    async def channel(
        dtype: Literal["float32", "bfloat16"], temperature: float = 1.0, **options: bool
    ) -> VerifiedChannel:
        spec = GeneratorSpec(model_path="-", dtype=dtype, sampling=Sampling(temperature=temperature))
        pool = GeneratorPool(spec, World().start, 1)
        await pool.setup()
        made = VerifiedChannel(FakeOwner(log_prob=0.0), pool, CANARY, **options)
        await made.verify()
        await pool.close()
        return made

    with pytest.raises(NumericsError):
        (await channel("float32")).compare_samples(off)
    (await channel("float32", holds_samples=False)).compare_samples(off)
    measured = await channel("bfloat16")  # both sides were equal: the floor
    assert measured.tolerance == Tolerance(largest=0.5, mean=2e-3, median=1e-3)
    with pytest.raises(NumericsError):
        measured.compare_samples(off)
    (await channel("bfloat16", temperature=0.1)).compare_samples(
        off
    )  # logits ten times as large, and their noise
