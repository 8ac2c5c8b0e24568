"""Inference engines in the store, and who is started, stopped and given up: a clock and a cluster by hand."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.errors import ConfigError, WorkerError
from modeseek_ray.jobs.engine_keeper import EngineKeeper, EngineSettings
from modeseek_ray.jobs.errors import StaleFenceError, TokenError
from modeseek_ray.jobs.launcher import LaunchStatus
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import EventDraft
from modeseek_ray.jobs.store import Store
from tests.modeseek_ray.service.conftest import write_model

LEASE_S = 60.0


@dataclass
class Cluster:
    """Engines run as soon as they are launched; the test says when they end."""

    statuses: dict[str, LaunchStatus] = field(default_factory=dict)
    away: bool = False

    async def launch_engine(self, engine_id: str, secret_path: Path, *, cpus: float, gpus: float) -> str:
        if self.away:
            raise WorkerError("Ray does not answer.", code="ray_unreachable")
        assert stat.S_IMODE(secret_path.stat().st_mode) == 0o600
        self.statuses[engine_id] = "running"
        return engine_id

    async def stop(self, submission_id: str) -> None:
        self.statuses[submission_id] = "stopped"

    async def status(self, submission_id: str) -> LaunchStatus:
        return self.statuses.get(submission_id, "unknown")


@dataclass
class World:
    store: Store
    home: Home
    cluster: Cluster
    keeper: EngineKeeper
    now: list[float]
    models: dict[str, str]

    def want(self, model: str) -> str:
        return self.store.engines.want(model, self.models[model]).id

    def token(self, engine_id: str) -> str:
        return str(json.loads(self.home.engine_secret(engine_id).read_text())["token"])

    def beat(self, engine_id: str, *, active: int = 0) -> str:
        return self.store.engines.heartbeat(
            engine_id, self.token(engine_id), address="http://127.0.0.1:1", ready=True, active=active
        )

    async def settle(self, passes: int = 3) -> None:
        for _ in range(passes):
            await self.keeper.reconcile()
            await asyncio.gather(*self.keeper._tasks.values())

    async def start(self, model: str) -> str:
        engine = self.want(model)
        await self.settle(1)
        self.beat(engine)
        return engine

    def states(self) -> dict[str, str]:
        return {engine.model: engine.state for engine in self.store.engines.living()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**settings: Any) -> World:
        now = [1000.0]
        home = Home(tmp_path / "home")
        home.prepare()
        store = Store(home.store_url, lease_s=LEASE_S, clock=lambda: now[0])
        cluster = Cluster()
        options = EngineSettings(**{"status_every_s": 0.0, **settings})
        keeper = EngineKeeper(store, home, cluster, url="http://127.0.0.1:8420", settings=options)
        paths = {name: str(write_model(tmp_path / "models" / name)) for name in ("a", "b", "c")}
        made.append(World(store, home, cluster, keeper, now, paths))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


async def test_one_engine_for_a_model_however_many_want_it(world: Callable[..., World]) -> None:
    here = world()
    engine = here.want("a")
    assert here.want("a") == engine and here.states() == {"a": "wanted"}
    await here.settle()
    assert here.states() == {"a": "launched"} and list(here.cluster.statuses) == [engine]
    assert here.beat(engine) == "run" and here.states() == {"a": "ready"}
    secret = json.loads(here.home.engine_secret(engine).read_text())
    assert (secret["dtype"], secret["max_length"]) == ("float32", 64)  # the model's own limit
    with pytest.raises(TokenError):
        here.store.engines.heartbeat(engine, "another", address="http://x", ready=True, active=0)
    with pytest.raises(TokenError):
        here.store.engines.heartbeat("engine-none", "t", address="http://x", ready=True, active=0)


async def test_an_engine_that_leaves_is_over_and_its_secret_goes(world: Callable[..., World]) -> None:
    here = world()
    engine = await here.start("a")
    token = here.token(engine)
    here.store.engines.left(engine, token, "idle")
    with pytest.raises(StaleFenceError):
        here.store.engines.heartbeat(engine, token, address="http://x", ready=True, active=0)
    assert here.want("a") != engine
    await here.settle(1)
    assert not here.home.engine_secret(engine).exists()


async def test_the_least_recently_used_idle_engine_makes_room(world: Callable[..., World]) -> None:
    here = world(max_engines=2)
    first, second = await here.start("a"), await here.start("b")
    here.now[0] += 10
    here.want("a")  # used again: `b` is the older one
    here.want("c")
    await here.settle()
    assert here.cluster.statuses[second] == "stopped" and here.cluster.statuses[first] == "running"
    assert here.states() == {"a": "ready", "c": "launched"}


async def test_engines_that_write_are_not_stopped_for_others(world: Callable[..., World]) -> None:
    here = world(max_engines=1)
    engine = await here.start("a")
    here.beat(engine, active=1)
    here.want("b")
    await here.settle()
    assert here.states() == {"a": "ready", "b": "wanted"}
    here.beat(engine)
    await here.settle()
    assert here.states() == {"b": "launched"}


async def test_what_nobody_waits_for_any_more_is_not_started(world: Callable[..., World]) -> None:
    here = world(max_engines=1, idle_s=30.0)
    engine = await here.start("a")
    here.beat(engine, active=1)
    here.want("b")
    here.now[0] += 31
    here.beat(engine, active=1)
    await here.settle()
    assert here.states() == {"a": "ready"}


@pytest.mark.parametrize("how", ["silent", "dead"])
async def test_an_engine_that_is_silent_or_dead_is_given_up(world: Callable[..., World], how: str) -> None:
    here = world()
    engine = await here.start("a")
    token = here.token(engine)
    if how == "dead":
        here.cluster.statuses[engine] = "failed"
    else:
        here.now[0] += LEASE_S + 1
    await here.settle()
    assert here.states() == {}
    with pytest.raises(StaleFenceError):
        here.store.engines.heartbeat(engine, token, address="http://x", ready=True, active=0)
    if how == "silent":
        assert here.cluster.statuses[engine] == "stopped"


async def test_a_cluster_that_is_away_is_asked_again_for_the_same_engine(world: Callable[..., World]) -> None:
    here = world()
    here.cluster.away = True
    engine = here.want("a")
    await here.settle()
    assert here.cluster.statuses == {} and here.states() == {"a": "launched"}
    here.cluster.away = False
    await here.settle()
    assert here.cluster.statuses == {engine: "running"}


async def test_a_directory_that_is_no_model_is_said_to_be_none(
    world: Callable[..., World], tmp_path: Path
) -> None:
    here = world()
    engine = here.store.engines.want("x", str(tmp_path / "nothing")).id
    await here.settle()
    record = here.store.engines.get(engine)
    assert record is not None and record.state == "ended"
    assert record.error is not None and record.error["code"] == "model_not_found"


async def test_engines_that_rest_give_way_to_a_job_that_waits(world: Callable[..., World]) -> None:
    here = world(give_way_s=30.0)
    resting, writing = await here.start("a"), await here.start("b")

    async def later(seconds: float) -> dict[str, str]:
        here.now[0] += seconds
        here.beat(resting)
        here.beat(writing, active=1)
        await here.settle()
        return here.states()

    job, _ = here.store.jobs.submit("ftjob-1", {"model": "m", "training_file": "f"})
    for state in ("validating", "queued"):
        job = here.store.jobs.move(job, state, EventDraft("", data={}))
    assert set(await later(31)) == {"a", "b"}  # a job in the queue waits for other jobs
    here.store.attempts.begin(job, "token")
    assert set(await later(29)) == {"a", "b"}
    assert await later(2) == {"b": "ready"}
    record = here.store.engines.get(resting)
    assert record is not None and record.outcome == "stopped"


async def test_stopping_a_model_stops_its_engine(world: Callable[..., World]) -> None:
    here = world()
    engine = await here.start("a")
    assert here.store.engines.stop_model(here.models["a"]) == [engine]
    assert here.beat(engine) == "stop"
    await here.settle()
    assert here.states() == {} and here.cluster.statuses[engine] == "stopped"


def test_settings_come_from_the_environment() -> None:
    assert EngineSettings.from_environment({}) == EngineSettings()
    given = {
        "MODESEEK_INFERENCE_IDLE_S": "20",
        "MODESEEK_INFERENCE_MAX": "3",
        "MODESEEK_INFERENCE_GPUS": "0.5",
    }
    found = EngineSettings.from_environment(given)
    assert (found.idle_s, found.max_engines, found.gpus) == (20.0, 3, 0.5)
    assert EngineSettings.from_environment({"MODESEEK_INFERENCE_PORTS": "8450-8459"}).ports == (8450, 8459)
    with pytest.raises(ConfigError, match="MODESEEK_INFERENCE_PORTS"):
        EngineSettings.from_environment({"MODESEEK_INFERENCE_PORTS": "8459-8450"})
    for bad in ("soon", "nan", "-1", "0"):
        with pytest.raises(ConfigError, match="MODESEEK_INFERENCE_IDLE_S"):
            EngineSettings.from_environment({"MODESEEK_INFERENCE_IDLE_S": bad})
