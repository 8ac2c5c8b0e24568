"""Requests over engines: none lost, none doubled, none written by two versions. Engines here are fakes
that write one token a turn; the real one that is killed is at the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.cluster import RayPlacement
from actors.generation_queue import MAX_REDOS
from actors.generator import GeneratorSpec, Request, Sampling, requests_of, seed_of
from actors.generator_pool import GeneratorPool
from actors.sources import probe_groups
from actors.trainer import TrainerSpec
from actors.weight_chunks import ChunkFacts, WeightRelease
from actors.weight_sync import VerifiedChannel
from modeseek_ray.config import Resources, Training
from modeseek_ray.errors import ConfigError, NumericsError, WorkerError
from modeseek_ray.types import Completion, Objective, Prompt, Sample, StepPlan
from tests.actors.conftest import random_samples

LENGTH = 3  # tokens, and so steps, of the shortest completion


def length_of(request: Request) -> int:
    """Completions of one prompt end at different times."""
    return LENGTH + request.seed % 4


def asked(name: str) -> str:
    """Prompt, round and which of the N, of the name a request has inside an engine."""
    return name.rpartition(".")[0]


class FakeEngine:
    """Writes one token of each request it holds per step. Dies when it is told to, or of a prompt."""

    def __init__(self, name: int, world: World) -> None:
        self.name = name
        self.world = world
        self.inside: dict[str, tuple[Request, int]] = {}
        self.version = 0
        self.dead = False
        self.written = 0
        self.most_inside = 0

    async def call(self, method: str, *args: Any) -> Any:
        await asyncio.sleep(0)
        if self.dead:
            raise WorkerError(f"engine {self.name} died.", mend="")
        return await getattr(self, method)(*args)

    async def setup(self) -> Mapping[str, Any]:
        return {"engine": "fake"}

    async def turn(self, requests: list[Request], leave: int, slice_s: float) -> list[tuple[str, Completion]]:
        assert self.version >= 0
        for request in requests:
            assert request.id not in self.inside
            self.inside[request.id] = (request, 0)
        self.most_inside = max(self.most_inside, len(self.inside))
        finished = []
        for _ in range(2):  # a slice: two steps, whether or not that is enough
            await self.world.step(self)
            if self.dead:
                raise WorkerError(f"engine {self.name} died.", mend="")
            for name, (request, written) in list(self.inside.items()):
                self.inside[name] = (request, written + 1)
                if written + 1 == length_of(request):
                    del self.inside[name]
                    self.written += 1
                    finished.append((name, self.completion(request)))
            if len(self.inside) <= leave:
                break
        return finished

    def completion(self, request: Request) -> Completion:
        return Completion(
            token_ids_T=np.array([request.prompt[0], request.seed % 997, 0], dtype=np.int32),
            log_prob_T=np.zeros(3, dtype=np.float32),
            finish_reason="stop",
            weight_version=self.version,
            seed=request.seed,
        )

    async def abort(self) -> list[str]:
        ids = list(self.inside)
        self.world.aborted.update(asked(name) for name in self.inside)
        self.inside.clear()
        return ids

    async def score(self, sequences: list[Any]) -> list[Any]:
        assert not self.inside
        return [np.full(len(s) - 1, float(self.version)) for s in sequences]

    async def install(self, version: int, checksum: str, *chunks: str) -> None:
        assert not self.inside
        self.version = -1
        for chunk in chunks:
            await self.update(chunk)
        self.version = version

    async def update(self, chunk: str) -> None:
        assert self.version == -1
        if self.world.dies_of_update(self):
            self.dead = True
            raise WorkerError(f"engine {self.name} died.", mend="")

    async def stop(self) -> None:
        self.dead = True


class World:
    """All engines that were ever started, and what happens to them."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.aborted: set[str] = set()
        self.on_step: Callable[[FakeEngine], None] = lambda engine: None
        self.dies_of_update: Callable[[FakeEngine], bool] = lambda engine: False
        self.gate = asyncio.Event()
        self.gate.set()
        self.door = asyncio.Event()
        self.door.set()

    async def start(self, index: int) -> FakeEngine:
        await self.door.wait()
        self.engines.append(FakeEngine(len(self.engines), self))
        return self.engines[-1]

    async def step(self, engine: FakeEngine) -> None:
        await asyncio.sleep(0)
        await self.gate.wait()
        self.on_step(engine)


def spec(**changes: Any) -> GeneratorSpec:
    sampling = Sampling(samples_per_prompt=changes.pop("samples", 2))
    return GeneratorSpec(model_path="-", sampling=sampling, max_length=64, **{"max_num_seqs": 4, **changes})


def prompts(count: int) -> list[Prompt]:
    return [Prompt(ordinal=i, token_ids_T=np.array([100 + i], dtype=np.int32)) for i in range(count)]


async def pool_of(world: World, engines: int, **changes: Any) -> GeneratorPool:
    pool = GeneratorPool(spec(**changes), world.start, engines)
    await pool.setup()
    return pool


def release(version: int) -> WeightRelease:
    return WeightRelease.of(version, ("chunk",), ChunkFacts(("x",), 1, 1, 0.0))


def assert_complete(answer: list[list[Completion]], count: int, *, samples: int = 2, round_: int = 0) -> None:
    """Every prompt has its N completions, in order, each from its own request."""
    assert len(answer) == count
    for ordinal, completions in enumerate(answer):
        assert [int(c.token_ids_T[0]) for c in completions] == [100 + ordinal] * samples
        assert [c.seed for c in completions] == [seed_of(0, ordinal, round_, i) for i in range(samples)]


@pytest.mark.parametrize("engines", [1, 3])
async def test_completions_come_back_in_the_order_of_the_prompts(engines: int) -> None:
    world = World()
    pool = await pool_of(world, engines)
    assert_complete(await pool.sample(prompts(20), round_=0), 20)
    assert sum(engine.written for engine in world.engines) == 40
    assert all(engine.written for engine in world.engines)
    assert all(engine.most_inside <= 8 for engine in world.engines)
    await pool.close()


async def test_an_engine_that_is_slow_is_handed_less() -> None:
    world = World()
    pool = await pool_of(world, 2)
    turns = {0: 0, 1: 0}
    step = world.step

    async def slow_for_the_first(engine: FakeEngine) -> None:
        for _ in range(20 if engine.name == 0 else 1):
            await step(engine)
        turns[engine.name] += 1

    world.step = slow_for_the_first  # type: ignore[method-assign]
    assert_complete(await pool.sample(prompts(60), round_=0), 60)
    first, second = world.engines
    assert 0 < first.written < second.written / 2
    await pool.close()


async def test_two_calls_at_once_are_answered_each_with_its_own() -> None:
    world = World()
    pool = await pool_of(world, 2)
    answers = await asyncio.gather(*(pool.sample(prompts(7), round_=r) for r in range(3)))
    for round_, answer in enumerate(answers):
        assert_complete(answer, 7, round_=round_)
    await pool.close()


async def test_who_asks_for_the_same_twice_gets_it_twice() -> None:
    world = World()
    pool = await pool_of(world, 1)
    for answer in await asyncio.gather(*(pool.sample(prompts(2), round_=0) for _ in range(2))):
        assert_complete(answer, 2)
    await pool.close()


async def test_a_caller_who_leaves_takes_nobody_with_him() -> None:
    world = World()
    world.gate.clear()
    pool = await pool_of(world, 1)
    leaver = asyncio.create_task(pool.sample(prompts(9), round_=0))
    stayer = asyncio.create_task(pool.sample(prompts(9), round_=1))
    while not (world.engines and world.engines[0].inside):
        await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.wait([leaver])
    world.gate.set()
    assert_complete(await stayer, 9, round_=1)
    assert world.engines[0].written == 18 + 8  # what was inside when he left, and no more of his
    await pool.close()


@pytest.mark.parametrize("engines", [1, 2])
async def test_an_engine_that_dies_is_replaced_and_its_work_redone(engines: int) -> None:
    world = World()
    pool = await pool_of(world, engines)
    await pool.hold()
    await pool.install(release(7))
    await pool.release(7)
    steps = 0

    def die_once(engine: FakeEngine) -> None:
        nonlocal steps
        steps += engine.name == 0
        engine.dead = engine.dead or (engine.name == 0 and steps == 5)

    world.on_step = die_once
    answer = await pool.sample(prompts(20), round_=0)
    assert_complete(answer, 20)
    assert len(world.engines) == engines + 1
    assert pool.num_replaced == 1
    assert world.engines[-1].version == 7  # brought to the version, before it wrote anything
    assert {c.weight_version for completions in answer for c in completions} == {7}
    assert world.engines[-1].written > 0
    await pool.close()


async def test_a_prompt_that_kills_engines_is_named_and_the_others_are_written() -> None:
    world = World()

    def die_of_prompt_3(engine: FakeEngine) -> None:
        engine.dead = engine.dead or any(r.prompt[0] == 103 for r, _ in engine.inside.values())

    world.on_step = die_of_prompt_3
    pool = await pool_of(world, 1, max_num_seqs=1)
    others = asyncio.create_task(pool.sample(prompts(3), round_=1))
    with pytest.raises(WorkerError, match="wrote for prompt 3"):
        await pool.sample(prompts(4)[3:], round_=0)
    assert_complete(await others, 3, round_=1)
    assert pool.num_replaced == MAX_REDOS + 1
    await pool.close()


async def test_engines_that_keep_dying_end_the_job() -> None:
    world = World()
    world.on_step = lambda engine: setattr(engine, "dead", True)
    pool = GeneratorPool(spec(), world.start, 1, max_replacements=2)
    await pool.setup()
    with pytest.raises(WorkerError, match="enough engines were replaced"):
        await pool.sample(prompts(1), round_=0)
    with pytest.raises(WorkerError, match="enough engines were replaced"):
        await pool.sample(prompts(1), round_=1)
    await pool.close()


@pytest.mark.parametrize("mode", ["drain", "restart"])
async def test_no_completion_is_written_by_two_versions(mode: Any) -> None:
    world = World()
    pool = await pool_of(world, 2)
    answer = asyncio.create_task(pool.sample(prompts(30), round_=0))
    while not any(written for engine in world.engines for _, written in engine.inside.values()):
        await asyncio.sleep(0)
    begun = {asked(name) for engine in world.engines for name in engine.inside}
    await pool.hold(mode)
    assert not answer.done()
    assert not any(engine.inside for engine in world.engines)
    await pool.install(release(1))
    await asyncio.sleep(0.01)
    assert not any(engine.inside for engine in world.engines)  # nothing before release
    await pool.release(1)
    completions = await answer
    assert_complete(completions, 30)
    by_version = {
        f"{ordinal}.0.{i}": c.weight_version
        for ordinal, group in enumerate(completions)
        for i, c in enumerate(group)
    }
    assert len(begun) == 16
    if mode == "drain":  # what had begun was finished by the version that began it, and nothing more
        assert {name for name, version in by_version.items() if version == 0} == begun
    else:
        assert world.aborted
        assert {by_version[name] for name in world.aborted} == {1}
    assert pool.version == 1
    await pool.close()


async def test_an_engine_that_dies_during_an_update_is_replaced_at_the_new_version() -> None:
    world = World()
    world.dies_of_update = lambda engine: engine.name == 1
    pool = await pool_of(world, 3)
    await pool.hold()
    await pool.install(release(4))
    assert [engine.version for engine in world.engines if not engine.dead] == [4, 4, 4]
    assert [scores[0].tolist() for scores in await pool.score([np.zeros(3, dtype=np.int32)])] == [
        [4.0, 4.0]
    ] * 3
    await pool.release(4)
    assert_complete(await pool.sample(prompts(5), round_=0), 5)
    await pool.close()


async def test_an_update_waits_for_an_engine_that_is_being_replaced() -> None:
    world = World()
    pool = await pool_of(world, 2)
    answer = asyncio.create_task(pool.sample(prompts(30), round_=0))
    while not all(engine.inside for engine in world.engines):
        await asyncio.sleep(0)
    world.door.clear()
    world.engines[0].dead = True
    while not pool.num_replaced:
        await asyncio.sleep(0)
    holding = asyncio.create_task(pool.hold())
    await asyncio.sleep(0.02)
    assert not world.engines[1].inside
    assert not holding.done()  # or two would be started in one place
    world.door.set()
    await holding
    await pool.install(release(3))
    await pool.release(3)
    assert_complete(await answer, 30)
    assert [engine.version for engine in world.engines] == [0, 3, 3]
    assert pool.num_replaced == 1
    await pool.close()


async def test_all_or_nothing_an_update_that_cannot_be_finished_stops_the_pool() -> None:
    world = World()
    world.dies_of_update = lambda engine: engine.name >= 1
    pool = GeneratorPool(spec(), world.start, 2, max_replacements=2)
    await pool.setup()
    waiting = asyncio.create_task(pool.sample(prompts(30), round_=0))
    await asyncio.sleep(0)
    await pool.hold()
    with pytest.raises(WorkerError, match="enough engines were replaced"):
        await pool.install(release(1))
    with pytest.raises(WorkerError):
        await waiting
    with pytest.raises(WorkerError):
        await pool.sample(prompts(1), round_=1)
    assert pool.version == 0
    assert pool.installed is None
    await pool.close()


async def test_refused_weights_are_never_written_with() -> None:
    world = World()
    pool = await pool_of(world, 1)
    await pool.hold()
    await pool.install(release(1))
    await pool.refuse(NumericsError("moved"))
    with pytest.raises(NumericsError, match="moved"):
        await pool.sample(prompts(1), round_=0)
    assert world.engines[0].written == 0
    await pool.close()


async def test_a_prompt_without_room_for_an_answer_is_refused_before_anything_is_asked() -> None:
    world = World()
    pool = await pool_of(world, 1)
    long = Prompt(ordinal=5, token_ids_T=np.zeros(64, dtype=np.int32))
    with pytest.raises(ConfigError, match="prompt 5 has 64 tokens"):
        await pool.sample([*prompts(2), long], round_=0)
    assert_complete(await pool.sample(prompts(2), round_=0), 2)
    await pool.close()


def test_requests_depend_on_job_prompt_round_and_index_alone() -> None:
    again = [requests_of(spec(), p, 1) for p in reversed(prompts(3))]
    once = [requests_of(spec(), p, 1) for p in prompts(3)]
    assert [[r.seed for r in rs] for rs in reversed(again)] == [[r.seed for r in rs] for rs in once]
    seeds = [seed_of(job, p, r, i) for job in range(3) for p in range(5) for r in range(5) for i in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # blake2b("0/0/0/0", 8 bytes) >> 1, worked out with coreutils' b2sum -l 64
    assert seed_of(0, 0, 0, 0) == 8662518681111019217


@pytest.mark.parametrize(
    ("sampling", "changes", "param"),
    [
        (Sampling(temperature=0.0), {}, "sampling.temperature"),
        (Sampling(temperature=0.0, samples_per_prompt=2), {"ratios_used": False}, "sampling.temperature"),
        (Sampling(temperature=0.001), {}, "sampling.temperature"),
        (Sampling(top_p=0.9), {}, "sampling.top_p"),
        (Sampling(), {"tensor_parallel": 2}, "tensor_parallel"),
    ],
)
def test_sampling_that_would_deceive_is_refused(
    sampling: Sampling, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        GeneratorSpec(model_path="-", sampling=sampling, **changes)
    assert refused.value.param == param
    GeneratorSpec(model_path="-", sampling=Sampling(temperature=0.0, top_p=0.9), ratios_used=False)


async def test_jobs_get_room_for_all_their_workers_or_wait_without_any(ray_cluster: Any) -> None:
    """Two jobs of four workers each, and CPUs for fewer than eight: neither holds a half the other waits for."""
    share = ray_cluster.available_resources()["CPU"] // 4
    engine_spec = GeneratorSpec(model_path="-", cpus_per_worker=share)
    jobs = [RayPlacement(Resources(trainers=2, cpus_per_worker=share)) for _ in range(2)]
    waiting = [
        asyncio.create_task(job.reserve(trainers=2, generators=2, generator=engine_spec)) for job in jobs
    ]
    done, others = await asyncio.wait(waiting, timeout=120, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(others)) == (1, 1)
    (second,) = others
    await asyncio.wait([second], timeout=1)
    assert not second.done()
    await jobs[waiting.index(done.pop())].close()
    await asyncio.wait_for(second, 120)  # all at once, when the first is over
    await jobs[waiting.index(second)].close()


@pytest.mark.slow
async def test_an_engine_killed_in_the_middle_of_a_rollout_costs_the_job_nothing(
    ray_cluster: Any, vllm_dense: Path
) -> None:
    resources = Resources(trainers=1, zero_stage=2)
    engine_spec = GeneratorSpec(
        model_path=str(vllm_dense),
        sampling=Sampling(samples_per_prompt=4, max_tokens=48),
        max_length=64,
        max_num_seqs=8,
        kv_cache_gib=0.1,
    )
    placement = RayPlacement(resources)
    await placement.reserve(trainers=1, generators=1, generator=engine_spec)
    trainer = await placement.trainers(
        TrainerSpec(str(vllm_dense), Objective(), Training(), resources, seed=0), 1
    )
    pool = await placement.generators(engine_spec, 1)
    try:
        _, facts = await asyncio.gather(trainer.setup(), pool.setup())
        asked = [Prompt(i, np.arange(5 + i, 15 + i, dtype=np.int32)) for i in range(60)]
        groups = probe_groups(random_samples(8), placement.put)
        plan = StepPlan(step=0, values_N=np.ones(8), denominator=50.0, learning_rate=1e-2)
        await trainer.step(groups, plan)
        channel = VerifiedChannel(trainer, pool, [p.token_ids_T for p in asked])
        figures = await channel.sync(1)
        assert figures["sync_largest_difference_nats"] < 1e-4

        rollout = asyncio.create_task(pool.sample(asked, round_=0))
        while not pool.num_written:
            await asyncio.sleep(0.01)
        assert pool.num_written < 240
        os.kill(facts["pid"], signal.SIGKILL)
        answer = await rollout

        assert pool.num_replaced == 1
        assert pool.num_written == 240  # none lost, none doubled
        for prompt, completions in zip(asked, answer, strict=True):
            assert [c.seed for c in completions] == [seed_of(0, prompt.ordinal, 0, i) for i in range(4)]
            assert {c.weight_version for c in completions} == {1}
        # Those of the engine that came later were written with the trainer's weights, too.
        samples = [
            Sample(
                i, ids_T := np.concatenate([p.token_ids_T, cs[-1].token_ids_T]), np.arange(len(ids_T)) >= 10
            )
            for i, (p, cs) in enumerate(zip(asked, answer, strict=True))
        ]
        scored = await trainer.score(probe_groups(samples, placement.put))
        ours_N = np.concatenate([g.log_policy_N for g in scored])
        row_N = np.concatenate([g.row_N for g in scored])
        theirs_N = np.array([answer[i][-1].log_prob_T.sum(dtype=np.float64) for i in row_N])
        assert np.abs(ours_N - theirs_N).max() < 1e-4 * 48
        assert (await channel.verify())["sync_largest_difference_nats"] < 1e-4
    finally:
        await pool.close()
        await trainer.close()
        await placement.close()
