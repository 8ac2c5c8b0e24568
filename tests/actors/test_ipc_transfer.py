"""Weights lent to an engine on the same GPU, as far as a machine without one allows: what a trainer lends is read by
vLLM's own receiver, with plain memory in the place of a GPU's, and the driver keeps the order of calls."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from actors.cards import card
from actors.generator_pool import GeneratorPool
from actors.pools import TrainerPool
from actors.trainer import TrainerRank
from actors.transfers import IpcTransfer
from actors.weight_sync import VerifiedChannel
from modeseek_ray.config import Lora, Training
from modeseek_ray.data.batching import deal
from modeseek_ray.errors import ConfigError, NumericsError, WorkerError
from modeseek_ray.types import Sample
from tests.actors.ranks import Start, plan_for
from tests.actors.test_generator_pool import World, pool_of
from tests.actors.test_weight_sync import CANARY, FakeOwner, weights_of


def lend_everything(rank: TrainerRank) -> list[tuple[dict[str, Any], torch.Tensor | None]]:
    """Each layer's update with what then lies in the buffer; rank 0 is on GPU-0, the engine's, rank 1 on GPU-1."""
    name = f"GPU-{rank._rank}"
    export = lambda tensor: (None, ("an", "export", "of", "so", "many", "bytes", 7, tensor.nbytes))  # noqa: E731
    lender = rank._ready().lender()
    found = []
    with (
        mock.patch("actors.ipc_transfer.card", return_value=name),
        mock.patch("actors.ipc_transfer.reduce_tensor", side_effect=export) as exports,
        mock.patch("torch.cuda.current_stream", mock.MagicMock()),
        mock.patch("torch.cuda.ipc_collect", mock.MagicMock()) as collected,
    ):
        while (update := rank.lend_weights(len(found), ["GPU-0"])) is not None:
            found.append((update, None if lender._buffer is None else lender._buffer.clone()))
        assert exports.call_count == (name == "GPU-0")  # memory that nobody opens would never come back
        rank.take_weights_back()
        assert collected.called and lender._buffer is None
    return found


def receive(updates: list[tuple[dict[str, Any], torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """What vLLM's engine on GPU-0 hands to its model."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    loaded: list[tuple[str, torch.Tensor]] = []
    engine: Any = IPCWeightTransferEngine.__new__(IPCWeightTransferEngine)
    engine.device, engine.model = SimpleNamespace(index=0), SimpleNamespace(load_weights=loaded.extend)
    engine.init_transfer_engine(engine.parse_init_info({"packed": True}))
    with mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(uuid="GPU-0")):
        for update, memory in updates:
            engine._packed_importer = SimpleNamespace(rebuild=lambda args, m=memory: m)
            engine.receive_weights(engine.parse_update_info(update))
    assert len(dict(loaded)) == len(loaded)
    return dict(loaded)


@pytest.mark.parametrize(
    ("model", "world_size", "options"),
    [
        ("tiny_moe", 2, {"zero_stage": 3, "lora": Lora(rank=2, target_experts=True)}),
        ("tiny_dense", 1, {"zero_stage": 2, "dtype": "bfloat16"}),
    ],
)
def test_vllm_reads_the_weights_that_a_rank_lends(
    model: str,
    world_size: int,
    options: dict[str, Any],
    start: Start,
    samples: list[Sample],
    request: pytest.FixtureRequest,
) -> None:
    training = Training(lora=options.pop("lora", None))
    trainer = start(model=request.getfixturevalue(model), world_size=world_size, training=training, **options)
    trainer.step(samples, plan_for(samples, rate=1e-2))
    lent, *others = trainer.inside(lend_everything)
    for other in others:  # helps to gather, and exports nothing
        assert all(not update["ipc_handles"] and memory is None for update, memory in other)
    assert len(lent) > 2, "a layer at a time"
    found, expected = receive(lent), weights_of(trainer)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class Lender(FakeOwner):
    """Three layers of six bytes; says who is where in `calls`."""

    def __init__(self, calls: list[str], cards: list[str], **changes: Any) -> None:
        super().__init__(**changes)
        self.calls = calls
        self.own = cards

    async def cards(self) -> list[str]:
        return self.own

    async def lend_weights(self, layer: int, cards: Collection[str]) -> Mapping[str, Any] | None:
        assert list(cards) == ["GPU-a", "GPU-b"]
        self.calls.append(f"lend {layer}")
        return None if layer == 3 else {"names": ["w"], "tensor_sizes": [2, 4], "ipc_handles": {}}

    async def take_weights_back(self) -> None:
        self.calls.append("take back")


async def lending(
    cards: list[str], **trainer: Any
) -> tuple[VerifiedChannel, GeneratorPool, list[str], World]:
    """A channel from trainers on `cards` to engines on GPU-a and GPU-b, and the calls it made."""
    calls: list[str] = []
    world = World()
    pool = await pool_of(world, 2)

    def natives(engine: Any, name: str) -> None:
        async def native(method: str, arguments: dict[str, Any]) -> None:
            await asyncio.sleep(0.001)
            calls.append(method)
            if method == "init_weight_transfer_engine":
                assert arguments == {"request": {"init_info": {"packed": True}}}
            if method == "finish_weight_update":
                engine.version = int(arguments["weight_version"])

        async def own_card() -> str:
            return name

        engine.native, engine.card = native, own_card

    for engine, name in zip(world.engines, ("GPU-a", "GPU-b"), strict=True):
        natives(engine, name)
    owner = Lender(calls, cards, **trainer)
    return VerifiedChannel(owner, pool, CANARY, transfer=IpcTransfer(owner, pool)), pool, calls, world


async def test_a_layer_is_lent_when_all_engines_have_read_the_last_one() -> None:
    channel, pool, calls, _ = await lending(["GPU-b", "GPU-c", "GPU-a"], log_prob=1.0)
    assert (await channel.sync(1))["sync_bytes"] == 3 * 6
    both = lambda method: [method] * 2  # noqa: E731
    update = [
        *both("start_weight_update"),
        *(step for i in range(3) for step in (f"lend {i}", *both("update_weights"))),
        "lend 3", *both("finish_weight_update"), "take back",
    ]  # fmt: skip
    assert calls == [*both("init_weight_transfer_engine"), *update]
    with pytest.raises(NumericsError, match="not the same on both sides"):
        await channel.sync(2)  # the engines say 2, the trainer still 1: proven as any other way
    assert calls[2 + len(update) :] == update, "they are introduced once"
    await pool.close()


async def test_an_engine_beside_no_trainer_is_refused() -> None:
    channel, pool, calls, _ = await lending(["GPU-a", "GPU-c"], log_prob=1.0)
    with pytest.raises(ConfigError, match="engine 1 is on GPU-b, where no trainer") as refused:
        await channel.sync(1)
    assert refused.value.param == "resources.weight_transfer" and "object_store" in str(refused.value.mend)
    assert calls == []
    await pool.close()


async def test_memory_is_taken_back_from_an_engine_that_dies() -> None:
    channel, pool, calls, world = await lending(["GPU-a", "GPU-b"], log_prob=1.0)
    native = world.engines[1].native  # type: ignore[attr-defined]

    async def dies(method: str, arguments: dict[str, Any]) -> None:
        if method == "update_weights":
            world.engines[1].dead = True
            raise WorkerError("engine 1 died.", mend="")
        await native(method, arguments)

    world.engines[1].native = dies  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match="engine 1 died"):
        await channel.sync(1)
    assert calls[-1] == "take back" and "finish_weight_update" not in calls
    await pool.close()


async def test_every_rank_s_export_comes_with_the_update() -> None:
    """Of all ranks: those that share their samples with another are beside engines of their own."""

    class Rank:
        def __init__(self, index: int) -> None:
            self.index = index

        async def call(self, method: str, layer: int, cards: list[str]) -> Any:
            if layer == 1:
                return None
            return {"names": ["w"], "tensor_sizes": [4], "ipc_handles": {f"GPU-{self.index}": (self.index,)}}

    pool = TrainerPool([Rank(i) for i in range(4)], deal, 2)  # type: ignore[misc]
    update = await pool.lend_weights(0, [])
    assert update is not None and update["ipc_handles"] == {f"GPU-{i}": (i,) for i in range(4)}
    assert await pool.lend_weights(1, []) is None


def test_a_worker_without_a_gpu_says_so() -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        pytest.raises(ConfigError, match="sees no GPU") as refused,
    ):
        card()
    assert "object_store" in str(refused.value.mend)


async def test_trainers_make_room_before_engines_wake() -> None:
    calls: list[str] = []
    world = World()
    pool = await pool_of(world, 1, sleeps=True)

    async def room() -> None:
        calls.append("room")

    async def turn(method: str) -> None:
        calls.append(method)

    engine: Any = world.engines[0]
    engine.sleep, engine.wake = lambda: turn("sleep"), lambda: turn("wake")
    pool.make_room = room
    for version in (1, 2):
        await pool.hold()
        await pool.release(version)
    assert calls == ["sleep", "room", "wake", "sleep"]
    await pool.close()
