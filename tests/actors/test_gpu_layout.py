"""What a job on GPUs asks of Ray, vLLM and DeepSpeed. The cards themselves were not at hand; see the README's table."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml

from actors.attempt_online import OnlineAttempt, generator_spec
from actors.bundles import layout_of
from actors.generator import GeneratorSpec, Sampling
from actors.generator_pool import GeneratorPool
from actors.transfers import IpcTransfer, MemoryTransfer, NcclTransfer
from actors.vllm_engine import arguments
from modeseek_ray.config import JobConfig, Resources, Training, parse_config
from modeseek_ray.errors import ConfigError
from tests.actors.test_generator_pool import FakeEngine, World, assert_complete, prompts, release

EXAMPLE = Path(__file__).parents[2] / "deploy" / "jobs" / "gpu" / "moe-30b-a3b-online.yaml"


def online(**resources: Any) -> JobConfig:
    """The example job on other resources."""
    job = yaml.safe_load(EXAMPLE.read_text())
    job["method"]["online"]["rollout"]["max_staleness"] = 0
    return parse_config({**job, "resources": resources})


def spec_of(config: JobConfig) -> GeneratorSpec:
    return generator_spec(config, "/models/m", 4096)


# --- places


def test_the_example_for_sixteen_cards_reserves_seventeen_places() -> None:
    config = parse_config(yaml.safe_load(EXAMPLE.read_text()))
    layout = layout_of(config.resources, trainers=8, scorers=1, generators=4, generator=spec_of(config))
    own, engine = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}
    assert layout.bundles == [own] * 9 + [engine] * 4
    assert (layout.trainers, layout.scorers) == (list(range(8)), [8])
    assert (layout.generators, layout.classifiers) == (list(range(9, 13)), [])


def test_colocated_engines_share_their_trainer_s_card() -> None:
    config = online(trainers=3, generators=2, colocated=True, gpus_per_worker=0.5, cpus_per_worker=2.0)
    spec = spec_of(config)
    layout = layout_of(config.resources, trainers=3, scorers=1, generators=2, generator=spec)
    half = {"CPU": 2.0, "GPU": 0.5}
    assert layout.bundles == [{"CPU": 4.0, "GPU": 1.0}] * 2 + [half] * 2
    assert layout.generators == [0, 1] == layout.trainers[:2] and layout.scorers == [3]
    assert spec.sleeps and not spec_of(online(gpus_per_worker=1.0)).sleeps


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"expert_parallel": True}, "expert_parallel deals experts out"),
        ({"tensor_parallel": 2, "gpus_per_worker": 0.5}, "needs whole GPUs"),
        ({"colocated": True, "generators": 2}, "need as many trainers"),
        ({"colocated": True, "gpus_per_worker": 1.0}, "set it to 0.5 or less"),
        (
            {"weight_transfer": "nccl"},
            r"gpus_per_worker 0 gives no worker a GPU of its own\. .* to object_store",
        ),
        ({"weight_transfer": "nccl", "gpus_per_worker": 0.5}, "gpus_per_worker 0.5 gives no worker a GPU"),
        (
            {"weight_transfer": "nccl", "gpus_per_worker": 0.5, "colocated": True},
            r"cannot be in one communicator twice\. .* weight_transfer to object_store",
        ),
        (
            {"weight_transfer": "ipc", "gpus_per_worker": 0.5},
            "without colocated every engine is on another one",
        ),
        ({"weight_transfer": "ipc", "colocated": True}, "gpus_per_worker 0 gives no worker one"),
        (
            {"trainers": 2, "gpus_per_worker": 0.5},
            "two trainers with 0.5 of a GPU may be put on the same one",
        ),
        ({"trainers": 2, "generators": 2, "gpus_per_worker": 0.2, "colocated": True}, "with 0.2 of a GPU"),
    ],
)
def test_what_does_not_go_together_is_refused(resources: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        online(**resources)
    assert refused.value.param == "resources"


@pytest.mark.parametrize(
    ("resources", "transfer"),
    [
        ({}, "chunks"),
        ({"gpus_per_worker": 1.0}, "chunks"),  # until NCCL was seen to work, it is the user who asks for it
        ({"gpus_per_worker": 1.0, "weight_transfer": "nccl"}, "nccl"),
        ({"gpus_per_worker": 1.0, "weight_transfer": "object_store"}, "chunks"),
        ({"gpus_per_worker": 0.5, "colocated": True}, "chunks"),
        ({"gpus_per_worker": 0.5, "colocated": True, "weight_transfer": "ipc"}, "ipc"),
    ],
)
def test_weights_go_from_card_to_card_where_that_is_asked_for(
    resources: dict[str, Any], transfer: str
) -> None:
    assert spec_of(online(**resources)).transfer == transfer


@pytest.mark.parametrize(
    ("transfer", "kind"), [("nccl", NcclTransfer), ("ipc", IpcTransfer), ("chunks", MemoryTransfer)]
)
def test_an_attempt_takes_the_transfer_its_engines_were_told_of(transfer: str, kind: type) -> None:
    """And rank 0's own address, for the group to meet at."""

    class Placed:
        async def meeting(self) -> tuple[str, int]:
            return "10.0.0.7", 4321

    attempt: Any = OnlineAttempt.__new__(OnlineAttempt)
    attempt._placement = Placed()
    pool = SimpleNamespace(spec=replace(spec_of(online()), transfer=transfer))
    found = asyncio.run(attempt._transfer(SimpleNamespace(), pool))
    assert type(found) is kind
    if transfer == "nccl":
        assert found._meeting == {"master_address": "10.0.0.7", "master_port": 4321}


def test_a_plan_says_of_each_way_how_it_travels() -> None:
    from actors.commands.check import TRANSFERS

    assert set(TRANSFERS) == set(get_args(Resources.model_fields["weight_transfer"].annotation))
    assert all("not yet run" in said for way, said in TRANSFERS.items() if way != "object_store")


def test_sleeping_and_working_at_once_is_refused() -> None:
    job = yaml.safe_load(EXAMPLE.read_text())
    with pytest.raises(ConfigError, match="max_staleness lets them work at once"):
        parse_config({**job, "resources": {"colocated": True, "gpus_per_worker": 0.5}})


# --- vLLM


def test_vllm_is_told_the_share_of_the_card_and_how_to_spread() -> None:
    whole = arguments(spec_of(online(gpus_per_worker=1.0, tensor_parallel=4, expert_parallel=True)))
    assert (whole["tensor_parallel_size"], whole["enable_expert_parallel"]) == (4, True)
    assert (whole["gpu_memory_utilization"], whole["enable_sleep_mode"]) == (0.9, False)
    shared = arguments(spec_of(online(gpus_per_worker=0.5, colocated=True)))
    assert (shared["gpu_memory_utilization"], shared["enable_sleep_mode"]) == (0.45, True)
    assert "distributed_executor_backend" not in shared and "kv_cache_memory_bytes" not in shared
    host = arguments(spec_of(online()))
    assert host["distributed_executor_backend"] == "uni" and "gpu_memory_utilization" not in host


def test_vllm_knows_every_argument() -> None:
    """vLLM's own list of engine arguments, by name: a misspelt one would be found on a card only."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for config in (online(gpus_per_worker=0.5, colocated=True), online()):
        assert set(arguments(spec_of(config))) | {"weight_transfer_config"} <= known


# --- sleep and wake


class Sleeper(FakeEngine):
    """Answers nothing but `wake` while it sleeps, and sleeps with nothing inside alone."""

    asleep = False

    async def call(self, method: str, *args: Any) -> Any:
        assert self.asleep == (method == "wake") or method == "setup", method
        return await super().call(method, *args)

    async def sleep(self) -> None:
        assert not self.inside
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False


class Dormitory(World):
    async def start(self, index: int) -> Sleeper:
        self.engines.append(Sleeper(len(self.engines), self))
        return self.engines[-1]  # type: ignore[return-value]

    @property
    def asleep(self) -> list[bool]:
        return [engine.asleep for engine in self.engines if not engine.dead]  # type: ignore[attr-defined]


async def sleeping_pool(world: World) -> GeneratorPool:
    spec = GeneratorSpec(
        model_path="-", sampling=Sampling(samples_per_prompt=2), max_length=64, max_num_seqs=4, sleeps=True
    )
    pool = GeneratorPool(spec, world.start, 2)
    await pool.setup()
    return pool


async def test_engines_sleep_between_rollouts_and_hand_overs() -> None:
    world = Dormitory()
    pool = await sleeping_pool(world)
    for round_ in range(3):
        calls = (pool.sample(prompts(9), round_=round_), pool.sample(prompts(2), round_=round_))
        first, second = await asyncio.gather(*calls)
        assert_complete(first, 9, round_=round_)
        assert_complete(second, 2, round_=round_)
        assert world.asleep == [True, True]  # here the trainer works
        await pool.hold()
        assert world.asleep == [False, False]
        await pool.install(release(round_ + 1))
        await pool.score([])
        assert world.asleep == [False, False], "awake from hold to release"
        await pool.release(round_ + 1)
        assert world.asleep == [True, True]
    assert {engine.version for engine in world.engines} == {3}
    await pool.close()


async def test_an_engine_that_dies_of_waking_is_replaced() -> None:
    world = Dormitory()
    pool = await sleeping_pool(world)
    await pool.sample(prompts(4), round_=0)
    world.engines[0].dead = True
    assert_complete(await pool.sample(prompts(8), round_=1), 8, round_=1)
    assert pool.num_replaced == 1 and world.asleep == [True, True]
    await pool.close()


# --- DeepSpeed


def test_deepspeed_s_configuration_on_cards() -> None:
    from actors.engine import deepspeed_config

    resources = Resources(
        zero_stage=3, dtype="bfloat16", offload_optimizer=True, gpus_per_worker=1.0, trainers=8
    )
    config = deepspeed_config(Training(), resources, cuda=True, persistence_threshold=None)
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert config["optimizer"]["params"]["fused"]
    assert config["bf16"]["enabled"] and config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1


def test_blocks_of_separate_experts_are_leaves_of_zero_3() -> None:
    import torch
    from deepspeed.utils import z3_leaf_module

    from actors.engine import mark_leaf_modules
    from tests.modeseek_ray.routing.models import build

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Block(), Block())
    assert mark_leaf_modules(model) == [Block]
    assert [z3_leaf_module(part) for part in model] == [False, True, True]
    for family in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"):
        assert mark_leaf_modules(build(family)) == [], "stacked experts: one parameter, fetched whole"
