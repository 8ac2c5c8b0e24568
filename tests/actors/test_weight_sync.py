"""Weights from trainer to engine: under the names of a checkpoint, all or nothing, and believed only
when both sides give the same log-probabilities."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.canary import UNMEASURED, Tolerance, compare, cut_canary, in_turn
from actors.generator_pool import GeneratorPool
from actors.rollout_source import _sample as sample_of
from actors.rollouts import Rollout
from actors.sources import probe_groups
from actors.trainer import TrainerRank
from actors.transfers import MemoryTransfer, NcclTransfer
from actors.weight_chunks import ChunkFacts, WeightChunk
from actors.weight_sync import VerifiedChannel
from modeseek_ray.config import Lora, Training
from modeseek_ray.errors import NumericsError, WorkerError
from modeseek_ray.rewards import Grade
from modeseek_ray.types import Completion, Objective, Sample, StepPlan
from tests.actors.conftest import random_samples
from tests.actors.engines import Engine, Engines
from tests.actors.ranks import Start, Trainer, plan_for
from tests.actors.test_generator import prompts
from tests.actors.test_generator_pool import World, assert_complete, pool_of
from tests.actors.test_generator_pool import prompts as fake_prompts

ROUNDS = 10
LIMIT = 1e-4  # nats a token, float32; about 1e-6 was seen


def all_weights(rank: TrainerRank) -> list[WeightChunk | ChunkFacts]:
    return list(rank.weights())


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    *chunks, facts = trainer.inside(all_weights)[0]
    assert facts.checksums == tuple(chunk.compute_checksum() for chunk in chunks)
    assert facts.num_bytes == sum(chunk.num_bytes for chunk in chunks)
    return {name: tensor for chunk in chunks for name, tensor in chunk.tensors()}


class Owner:
    """The trainer of the test's harness, as the channel sees it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def weights(self) -> tuple[list[Any], ChunkFacts]:
        answers = await asyncio.to_thread(self._trainer.inside, all_weights)
        for others in answers[1:]:  # only rank 0 sends
            assert [type(thing) for thing in others] == [ChunkFacts]
        *chunks, facts = answers[0]
        return chunks, facts

    async def canary(self, sequences: Sequence[Any]) -> list[Any]:
        first, *others = await asyncio.to_thread(self._trainer.each, "canary", sequences)
        for other in others:
            np.testing.assert_array_equal(np.concatenate(first), np.concatenate(other))
        return first


@pytest.mark.parametrize(
    ("model", "world_size", "options"),
    [
        ("vllm_dense", 1, {"zero_stage": 2}),
        ("vllm_moe", 2, {"zero_stage": 3}),
        ("tiny_moe", 2, {"zero_stage": 3, "lora": Lora(rank=2, target_experts=True)}),
        ("tiny_dense", 1, {"zero_stage": 2, "dtype": "bfloat16", "lora": Lora(rank=2)}),
    ],
)
def test_weights_are_those_an_export_would_hold(
    model: str,
    world_size: int,
    options: dict[str, Any],
    start: Start,
    samples: list[Sample],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    training = Training(lora=options.pop("lora", None))
    trainer = start(model=request.getfixturevalue(model), world_size=world_size, training=training, **options)
    trainer.step(samples, plan_for(samples, rate=1e-2))
    before = trainer.sha256()
    found = weights_of(trainer)
    assert trainer.sha256() == before  # LoRA is merged out of place
    trainer.each("export", str(tmp_path))
    expected = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_canary_is_scored_at_temperature_one_whatever_the_policy_is_trained_at(
    start: Start, samples: list[Sample]
) -> None:
    sequences = [s.token_ids_T for s in samples]
    warm = start(objective=Objective(temperature=0.5)).each("canary", sequences)[0]
    trainer = start(objective=Objective())
    plain = trainer.each("canary", sequences)[0]
    np.testing.assert_allclose(np.concatenate(warm), np.concatenate(plain), atol=1e-6)
    everything = [
        Sample(row=i, token_ids_T=s, trained_T=np.arange(len(s)) > 0) for i, s in enumerate(sequences)
    ]
    np.testing.assert_allclose([c.sum() for c in plain], trainer.score(everything), atol=1e-5)


async def trained_and_synced(engine: Engine, trainer: Trainer, rounds: int) -> GeneratorPool:
    """Train a step and give the engine the weights, so many times; the pool that wrote in between."""
    pool = GeneratorPool(engine.spec, engine.worker, 1)
    await pool.setup()
    first = engine.call("version")
    channel = VerifiedChannel(Owner(trainer), pool, [p.token_ids_T for p in prompts()])
    scores = []
    for round_ in range(rounds):
        samples = random_samples(8, seed=round_)
        await asyncio.to_thread(trainer.step, samples, plan_for(samples, step=round_, rate=1e-2))
        figures = await channel.sync(first + round_ + 1)
        assert figures["sync_largest_difference_nats"] < LIMIT
        assert figures["sync_bytes"] > 0
        written = await pool.sample(prompts(2), round_=round_)
        assert {c.weight_version for cs in written for c in cs} == {first + round_ + 1}
        assert await largest_difference(trainer, channel, written) < LIMIT
        scores.append(np.concatenate((await pool.score([prompts()[-1].token_ids_T]))[0]))
    # The weights did move, each time, by far more than the tolerance.
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(scores)) > 100 * LIMIT
    return pool


async def largest_difference(
    trainer: Trainer, channel: VerifiedChannel, written: Sequence[Sequence[Completion]]
) -> float:
    """|exp(log p trainer - log p engine) - 1| of the token that is furthest off, of what the engine just wrote."""
    rollouts = [
        Rollout(prompt, i, completion, "", Grade(1.0))
        for prompt, completions in zip(prompts(len(written)), written, strict=True)
        for i, completion in enumerate(completions)
    ]
    begun = trainer.pool()
    groups = await begun.begin(probe_groups([sample_of(r, 0) for r in rollouts], lambda block: block))
    channel.compare_samples(groups)
    plan = StepPlan(step=0, values_N=np.zeros(len(rollouts)), denominator=1.0, learning_rate=0.0)
    return (await begun.step(groups, plan)).figures["mismatch/max_abs_delta"]


STAGES = [{"zero_stage": 2, "world_size": 1}, {"zero_stage": 3, "world_size": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
async def test_a_dense_engine_and_its_trainer_agree_after_every_one_of_ten_syncs(
    dense_engine: Engine, start: Start, vllm_dense: Path, stage: Mapping[str, int]
) -> None:
    trainer = start(model=vllm_dense, **stage)
    pool = await trained_and_synced(dense_engine, trainer, ROUNDS)
    await pool.close()
    await assert_caught(dense_engine, trainer)  # the packed copy of a tied output layer


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
async def test_an_moe_engine_and_its_trainer_agree_after_every_one_of_ten_syncs(
    moe_engine: Engine, start: Start, vllm_moe: Path, stage: Mapping[str, int]
) -> None:
    trainer = start(model=vllm_moe, objective=Objective(temperature=0.7), **stage)
    pool = await trained_and_synced(moe_engine, trainer, ROUNDS)
    channel = VerifiedChannel(Owner(trainer), pool, [p.token_ids_T for p in prompts()])
    assert (await channel.verify())["sync_largest_difference_nats"] < LIMIT
    await pool.close()
    await assert_caught(moe_engine, trainer)  # the layout of the experts


async def assert_caught(engine: Engine, trainer: Trainer) -> None:
    """Weights loaded as vLLM 0.30 by itself would: refused with both numbers, and never written with."""
    samples = random_samples(8)
    await asyncio.to_thread(trainer.step, samples, plan_for(samples, rate=1e-2))
    pool = GeneratorPool(engine.spec, engine.worker, 1)
    await pool.setup()
    channel = VerifiedChannel(Owner(trainer), pool, [p.token_ids_T for p in prompts()])
    engine.call("repack", False)
    try:
        with pytest.raises(NumericsError, match="not the same on both sides") as caught:
            await channel.sync(500)
    finally:
        engine.call("repack", True)
    ours, theirs = _both_numbers(str(caught.value))
    assert abs(ours - theirs) > LIMIT
    with pytest.raises(NumericsError, match="not the same on both sides"):
        await pool.sample(prompts(1), round_=100)
    await pool.close()

    pool = GeneratorPool(engine.spec, engine.worker, 1)
    await pool.setup()
    channel = VerifiedChannel(Owner(trainer), pool, [p.token_ids_T for p in prompts()])
    assert (await channel.sync(501))["sync_largest_difference_nats"] < LIMIT
    await pool.close()


def _both_numbers(message: str) -> tuple[float, float]:
    words = message.split()
    return float(words[words.index("trainer") - 3]), float(words[words.index("engine") - 2])


class FakeOwner:
    def __init__(self, *, dies: bool = False, log_prob: float | None = None) -> None:
        self.dies = dies
        self.log_prob = log_prob

    async def weights(self) -> tuple[list[Any], ChunkFacts]:
        await asyncio.sleep(0.01)
        if self.dies:
            raise WorkerError("trainer rank 1 died.", mend="")
        return ["chunk"], ChunkFacts(("x",), 1, 1, 0.0)

    async def canary(self, sequences: Sequence[Any]) -> list[Any]:
        return [np.full(len(s) - 1, self.log_prob) for s in sequences]


CANARY = [np.arange(4, dtype=np.int32)]


async def test_a_trainer_that_dies_leaves_the_engines_as_they_were() -> None:
    world = World()
    pool = await pool_of(world, 2)
    answer = asyncio.create_task(pool.sample(fake_prompts(30), round_=0))
    await asyncio.sleep(0)
    with pytest.raises(WorkerError, match="rank 1 died"):
        await VerifiedChannel(FakeOwner(dies=True), pool, CANARY).sync(1)
    completions = await answer
    assert_complete(completions, 30)
    assert {c.weight_version for cs in completions for c in cs} == {0}
    assert [engine.version for engine in world.engines] == [0, 0]
    await pool.close()


async def test_one_engine_that_differs_stops_all() -> None:
    world = World()
    pool = await pool_of(world, 2)
    with pytest.raises(NumericsError, match=r"5\.500000 in the trainer and 5\.000000 in engine 0, 5\.00e-01"):
        await VerifiedChannel(FakeOwner(log_prob=5.5), pool, CANARY).sync(5)
    assert pool.version == 0
    with pytest.raises(NumericsError):
        await pool.sample(fake_prompts(1), round_=0)
    await pool.close()


async def test_a_sync_says_how_long_each_part_took_and_an_old_version_is_refused() -> None:
    world = World()
    pool = await pool_of(world, 1)
    channel = VerifiedChannel(FakeOwner(log_prob=5.0), pool, CANARY)
    figures = await channel.sync(5)
    parts = [figures[f"sync_{part}_seconds"] for part in ("drain", "gather", "load", "verify")]
    assert max(parts) <= figures["sync_seconds"] <= sum(parts) + 1
    assert figures["sync_largest_difference_nats"] == 0.0
    assert figures["sync_engines_replaced"] == 0.0
    with pytest.raises(ValueError, match="5 is not newer than 5"):
        await channel.sync(5)
    await pool.close()


@pytest.mark.parametrize(
    ("theirs", "tolerance", "passes"),
    [
        ([-1.0, -2.0], Tolerance(1e-9, 1e-9, 1e-9), True),
        ([-1.0, -2.3], Tolerance(0.5, 0.2, 0.2), True),  # largest .3, mean and median .15
        ([-1.0, -2.3], Tolerance(0.2, 0.2, 0.2), False),
        ([-1.0, -2.3], Tolerance(0.5, 0.1, 0.2), False),
        ([-1.0, -2.3], Tolerance(0.5, 0.2, 0.1), False),
        ([-1.0, float("nan")], Tolerance(9.0, 9.0, 9.0), False),
        ([-1.0, float("-inf")], Tolerance(9.0, 9.0, 9.0), False),
    ],
)
def test_what_is_too_far_apart(theirs: list[float], tolerance: Tolerance, passes: bool) -> None:
    ours = [np.array([-1.0, -2.0])]
    if passes:
        figures = compare(ours, [[np.array(theirs)]], tolerance, version=1)
        assert figures["sync_mean_difference_nats"] == pytest.approx(abs(theirs[1] + 2) / 2)
    else:
        with pytest.raises(NumericsError, match="token 2 of canary 0"):
            compare(ours, [[np.array(theirs)]], tolerance, version=1)


@pytest.mark.parametrize("engine_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainer_dtype", ["float32", "bfloat16", None])
async def test_the_coarser_of_both_dtypes_decides_what_is_allowed(
    engine_dtype: str, trainer_dtype: str | None
) -> None:
    world = World()
    pool = await pool_of(world, 1, dtype=engine_dtype)
    channel = VerifiedChannel(FakeOwner(log_prob=5.01), pool, CANARY, trainer_dtype=trainer_dtype)
    if "bfloat16" in (engine_dtype, trainer_dtype):
        assert (await channel.sync(5))["sync_mean_difference_nats"] == pytest.approx(0.01)
    else:
        with pytest.raises(NumericsError, match=r"allowed: 1\.0e-04, 1\.0e-04 and 1\.0e-04"):
            await channel.sync(5)
    await pool.close()


async def test_in_bfloat16_what_a_sync_is_held_to_was_measured_before_the_first_step() -> None:
    """.01 nats apart on the same weights: three times that is allowed in the median, and four are refused."""
    pool = await pool_of(World(), 1, dtype="bfloat16")
    owner = FakeOwner(log_prob=0.01)
    channel = VerifiedChannel(owner, pool, CANARY)
    figures = await channel.verify()
    assert figures["sync_allowed_median_nats"] == channel.tolerance.median == pytest.approx(0.03)
    owner.log_prob = 5.02
    await channel.sync(5)
    await channel.verify()  # measures no more: the weights are no longer the model's own
    assert channel.tolerance.median == pytest.approx(0.03)
    owner.log_prob = 6.04  # the unmeasured tolerance would have let it through
    assert UNMEASURED.median > 0.04
    with pytest.raises(NumericsError, match=r"4\.00e-02 in the median \(allowed: .* and 3\.0e-02\)"):
        await channel.sync(6)
    await pool.close()


@pytest.mark.slow
async def test_the_layout_of_experts_is_caught_in_bfloat16_too(
    engines: Engines, start: Start, quiet_moe: Path
) -> None:
    """Weights so small that the spoilt engine is nearer to the trainer than another model's rounding."""
    engine = engines.of(quiet_moe, dtype="bfloat16")
    trainer = start(model=quiet_moe, zero_stage=2)
    pool = GeneratorPool(engine.spec, engine.worker, 1)
    await pool.setup()
    channel = VerifiedChannel(
        Owner(trainer), pool, [p.token_ids_T for p in prompts(12)], trainer_dtype="float32"
    )
    await channel.verify()
    for version in (1, 2):
        samples = random_samples(8, seed=version)
        await asyncio.to_thread(trainer.step, samples, plan_for(samples, step=version - 1, rate=1e-3))
        await channel.sync(version)
    engine.call("repack", False)
    with pytest.raises(NumericsError, match="not the same on both sides") as caught:
        await channel.sync(3)
    apart = [float(number) for number in re.findall(r"\d\.\d\de-\d\d", str(caught.value))]
    for seen, unmeasured in zip(apart, (UNMEASURED.largest, UNMEASURED.mean, UNMEASURED.median), strict=True):
        assert seen < unmeasured  # what was not measured would have been believed
    await pool.close()


class NcclWorld:
    """What NCCL would do, as far as order goes: both sides of a collective have to be inside at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.parties = 0
        self.met = asyncio.Event()

    async def meet(self, name: str, world_size: int) -> None:
        self.calls.append(name)
        self.parties += 1
        if self.parties == world_size:
            self.met.set()
        await asyncio.wait_for(self.met.wait(), 1)
        self.parties -= 1
        if not self.parties:
            self.met.clear()


class NcclTrainer(FakeOwner):
    def __init__(self, world: NcclWorld, **changes: Any) -> None:
        super().__init__(**changes)
        self.world = world

    async def join_transfer(self, address: str, port: int, world_size: int) -> None:
        assert (address, port, world_size) == ("10.0.0.1", 1234, 3)
        await self.world.meet("join", 3)

    async def describe_transfer(self) -> dict[str, Any]:
        return {"names": ["a", "b"], "dtype_names": ["float32", "bfloat16"], "shapes": [[2, 3], [5]]}

    async def send_weights(self) -> None:
        await self.world.meet("send", 3)


async def test_nccl_both_sides_meet_and_every_engine_has_its_own_ranks() -> None:
    world, fakes = NcclWorld(), World()
    pool = await pool_of(fakes, 2)
    offsets = []

    def native_of(engine: Any) -> Any:
        async def native(method: str, arguments: dict[str, Any]) -> None:
            world.calls.append(method)
            match method:
                case "init_weight_transfer_engine":
                    info = arguments["request"]["init_info"]
                    offsets.append(info["rank_offset"])
                    assert (info["world_size"], info["packed"]) == (3, True)
                    await world.meet("joined", 3)
                case "update_weights":
                    assert arguments["request"]["update_info"]["shapes"] == [[2, 3], [5]]
                    await world.meet("received", 3)
                case "finish_weight_update":
                    engine.version = int(arguments["weight_version"])

        return native

    for engine in fakes.engines:
        engine.native = native_of(engine)  # type: ignore[attr-defined]
    trainer = NcclTrainer(world, log_prob=1.0)
    channel = VerifiedChannel(trainer, pool, CANARY, transfer=NcclTransfer(trainer, pool, "10.0.0.1", 1234))
    assert (await channel.sync(1))["sync_bytes"] == 2 * 3 * 4 + 5 * 2
    assert sorted(offsets) == [1, 2]
    trainer.log_prob = 2.0
    await channel.sync(2)
    assert world.calls.count("join") == 1  # once for the job
    second = world.calls[world.calls.index("finish_weight_update") :]
    assert [c for c in second if c in ("start_weight_update", "send", "finish_weight_update")] == [
        *["finish_weight_update"] * 2, *["start_weight_update"] * 2, "send", *["finish_weight_update"] * 2
    ]  # fmt: skip
    await pool.close()


def test_a_canary_leaves_room_for_the_token_an_engine_wants_to_write() -> None:
    sequences = [np.arange(n, dtype=np.int32) for n in (1, 5, 100, 9)]
    assert [len(s) for s in cut_canary(sequences, max_length=8)] == [5, 7, 7]
    assert [len(s) for s in cut_canary(sequences, max_length=1000, count=2)] == [5, 32]
    with pytest.raises(ValueError, match="two tokens"):
        cut_canary(sequences[:1], max_length=8)


def test_each_sync_is_proven_by_other_sequences_until_all_had_their_turn() -> None:
    bank = [np.full(16, i, dtype=np.int32) for i in range(7)]
    turns = [[int(s[0]) for s in in_turn(bank, version, 32)] for version in range(1, 8)]
    assert all(len(turn) == 2 for turn in turns)
    assert set(itertools.chain(*turns)) == set(range(7))
    assert all(set(a) != set(b) for a, b in itertools.pairwise(turns))
    assert [len(in_turn(bank[:1], version, 256)) for version in (1, 2)] == [1, 1]


async def test_the_trainer_scores_its_canary_while_the_engines_load() -> None:
    """Neither waits for the other: each of both is let go by the other's begin."""
    begun: dict[str, asyncio.Event] = {"load": asyncio.Event(), "canary": asyncio.Event()}
    fakes = World()
    pool = await pool_of(fakes, 1)

    class Waiting(FakeOwner):
        async def canary(self, sequences: Sequence[Any]) -> list[Any]:
            begun["canary"].set()
            await asyncio.wait_for(begun["load"].wait(), 60)
            return await super().canary(sequences)

    class Slow(MemoryTransfer):
        async def load(self, gathered: Any, version: int) -> int:
            begun["load"].set()
            await asyncio.wait_for(begun["canary"].wait(), 60)
            return await super().load(gathered, version)

    owner = Waiting(log_prob=1.0)
    channel = VerifiedChannel(owner, pool, CANARY, transfer=Slow(owner, pool))
    assert (await channel.sync(1))["sync_largest_difference_nats"] == 0.0
    await pool.close()


async def test_a_canary_that_the_trainer_cannot_score_stops_the_engines() -> None:
    pool = await pool_of(World(), 1)

    class Broken(FakeOwner):
        async def canary(self, sequences: Sequence[Any]) -> list[Any]:
            raise WorkerError("trainer rank 0 died.", mend="")

    with pytest.raises(WorkerError, match="rank 0 died"):
        await VerifiedChannel(Broken(), pool, CANARY).sync(1)
    with pytest.raises(WorkerError, match="rank 0 died"):
        await pool.sample(fake_prompts(1), round_=0)
    await pool.close()
