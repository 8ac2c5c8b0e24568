"""Starts inference engines that are wanted, stops those that are not, and notices their loss.

The reconciler calls `reconcile` in each of its passes, as the one leader. What is kept between passes
only spares questions: all that matters is in the store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from modeseek_ray.errors import ConfigError, WorkerError
from modeseek_ray.jobs.engine_store import EngineRecord
from modeseek_ray.jobs.engine_wire import EngineSecret
from modeseek_ray.jobs.launcher import ENDED, LaunchStatus
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.paths import Home, write_private
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.jobs.store import Store

log = logging.getLogger(__name__)

_UNREACHABLE = (WorkerError, OSError, TimeoutError)


class EngineLauncher(Protocol):
    """Starts and stops the process of an engine. `jobs.launcher.Launcher` says what the calls promise."""

    async def launch_engine(self, engine_id: str, secret_path: Path, *, cpus: float, gpus: float) -> str:
        """Start it where so many CPUs and GPUs are free, now or later; adopt one that is there already."""
        ...

    async def stop(self, submission_id: str) -> None: ...

    async def status(self, submission_id: str) -> LaunchStatus: ...


@dataclass(frozen=True)
class EngineSettings:
    """Times in seconds, lengths in tokens. `from_environment` says where operators set them."""

    idle_s: float = 300.0  # without an answer to write, an engine ends
    max_engines: int = 2  # at a time; the least recently used one makes room
    wait_s: float = 120.0  # how long a request waits for its engine before it is told to come again
    max_length: int = 4096  # prompt and answer together; the model's own limit where that is lower
    cpus: float = 1.0
    gpus: float = 0.0
    ports: tuple[int, int] = (0, 0)  # first and last that engines listen on; 0 = any
    give_way_s: float = 30.0  # a job that waits for so long ends engines that were not used for so long
    status_every_s: float = 3.0
    stop_grace_s: float = 15.0  # then it counts as gone: its token is void
    call_timeout_s: float = 20.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> EngineSettings:
        """`MODESEEK_INFERENCE_IDLE_S`, `_MAX`, `_WAIT_S`, `_MAX_LENGTH`, `_CPUS`, `_GPUS`, `_PORTS`.

        Raises `ConfigError`.
        """
        given = os.environ if environment is None else environment
        kinds: dict[str, tuple[str, type[int] | type[float], float]] = {
            "idle_s": ("IDLE_S", float, 1),
            "max_engines": ("MAX", int, 1),
            "wait_s": ("WAIT_S", float, 0),
            "max_length": ("MAX_LENGTH", int, 2),
            "cpus": ("CPUS", float, 0),
            "gpus": ("GPUS", float, 0),
        }
        values: dict[str, Any] = {}
        for field, (suffix, kind, least) in kinds.items():
            name = f"MODESEEK_INFERENCE_{suffix}"
            text = given.get(name)
            if not text:
                continue
            try:
                values[field] = kind(text)
            except ValueError:
                values[field] = float("nan")
            if not least <= values[field] < float("inf"):
                raise ConfigError(
                    f"{text!r} is not a number of at least {least:g}.", param=name, mend="Mend or unset it."
                )
        if text := given.get("MODESEEK_INFERENCE_PORTS"):
            values["ports"] = _ports(text)
        return cls(**values)


def _ports(text: str) -> tuple[int, int]:
    """`8450-8459`"""
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 2**16:
        raise ConfigError(
            f"{text!r} is no range of ports.", param="MODESEEK_INFERENCE_PORTS", mend="Write it as 8450-8459."
        )
    return int(match[1]), int(match[2])


class EngineKeeper:
    """One per service; works while its reconciler leads."""

    def __init__(
        self, store: Store, home: Home, launcher: EngineLauncher, *, url: str, settings: EngineSettings
    ) -> None:
        """Engines report to `url`."""
        self._store = store
        self._home = home
        self._launcher = launcher
        self._url = url
        self.settings = settings
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._asked_at: dict[str, float] = {}
        self._living: set[str] | None = None  # at the last sweep

    async def reconcile(self) -> None:
        """One pass over every engine that lives; what takes long goes on in tasks."""
        living = await asyncio.to_thread(self._store.engines.living)
        now = self._store.database.clock()
        room = self.settings.max_engines - sum(engine.state != "wanted" for engine in living)
        for engine in living:
            if engine.state == "wanted":
                if now - engine.used_at > self.settings.idle_s:
                    await asyncio.to_thread(
                        self._store.engines.end, engine.id, "nobody waits for it any more"
                    )
                elif room > 0:
                    room -= 1
                    self._start_task(engine, self._launch(engine))
                else:
                    await self._make_room(living)
            elif engine.lease_until < now:
                self._start_task(engine, self._lose(engine, "it sent no heartbeat and its lease ran out"))
            elif engine.state == "stopping":
                self._start_task(engine, self._stop(engine))
            elif engine.state == "launched" and now - engine.used_at > self.settings.idle_s:
                await asyncio.to_thread(self._store.engines.stop, engine.id)  # nobody waits for it any more
            elif now - self._asked_at.get(engine.id, 0.0) >= self.settings.status_every_s:
                self._asked_at[engine.id] = now
                self._start_task(engine, self._watch(engine))
        await self._give_way(living, now)
        await self._sweep({engine.id for engine in living})

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _give_way(self, living: list[EngineRecord], now: float) -> None:
        """Jobs come first: engines that rest end while one has been waiting for its workers."""
        resting = [
            engine
            for engine in living
            if engine.state == "ready"
            and engine.active == 0
            and now - engine.used_at > self.settings.give_way_s
        ]
        if not resting:
            return
        starting = await asyncio.to_thread(self._store.jobs.in_states, "starting")
        if any(now - job.state_at > self.settings.give_way_s for job in starting):
            for engine in resting:
                log.info("%s (%s) gives way to a job", engine.id, engine.model)
                await asyncio.to_thread(self._store.engines.stop, engine.id)

    async def _sweep(self, living: set[str]) -> None:
        """Secrets and written-out checkpoints of engines that are gone."""
        if living == self._living:
            return
        self._living = living
        self._asked_at = {name: at for name, at in self._asked_at.items() if name in living}
        found = self._home.engines.iterdir() if self._home.engines.is_dir() else ()
        for directory in [path for path in found if path.name not in living]:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _make_room(self, living: list[EngineRecord]) -> None:
        """The least recently used engine that is not writing goes, unless one is on its way out already."""
        if any(engine.state == "stopping" for engine in living):
            return
        idle = [engine for engine in living if engine.state == "ready" and engine.active == 0]
        if idle:
            oldest = min(idle, key=lambda engine: engine.used_at)
            if await asyncio.to_thread(self._store.engines.stop, oldest.id):
                log.info("%s (%s) makes room for another model", oldest.id, oldest.model)

    async def _launch(self, engine: EngineRecord) -> None:
        """The secret is on disk before the token is in the store, and that before anything runs."""
        try:
            secret = await asyncio.to_thread(self._secret_of, engine)
        except Exception as error:
            await self._end(engine, f"it could not be started: {error}", error)
            return
        path = self._home.engine_secret(engine.id)
        await asyncio.to_thread(write_private, path, secret.model_dump_json())
        if not await asyncio.to_thread(self._store.engines.arm, engine.id, secret.token):
            return
        await self._submit(engine, secret.cpus, secret.gpus)

    async def _submit(self, engine: EngineRecord, cpus: float, gpus: float) -> None:
        path = self._home.engine_secret(engine.id)
        try:
            launch = self._launcher.launch_engine(engine.id, path, cpus=cpus, gpus=gpus)
            submission = await asyncio.wait_for(launch, self.settings.call_timeout_s)
        except _UNREACHABLE as error:
            log.warning("%s waits for the cluster: %s", engine.id, error or type(error).__name__)
            return
        except Exception as error:
            await self._end(engine, f"it could not be started: {error or type(error).__name__}", error)
            return
        await asyncio.to_thread(self._store.engines.launched, engine.id, submission)

    def _secret_of(self, engine: EngineRecord) -> EngineSecret:
        path = Path(engine.model_path)
        job = job_of_checkpoint(self._home, path)
        info = ModelInfo.read(path if job is None else job.model_path)
        dtype: Literal["float32", "bfloat16"] = "float32" if info.dtype_bytes >= 4 else "bfloat16"
        return EngineSecret(
            engine=engine.id,
            token=secrets.token_urlsafe(32),
            url=self._url,
            model_path=str(path if job is None else self._home.engine_model(engine.id)),
            checkpoint=None if job is None else str(path),
            job=None if job is None else str(self._home.config(job.job_id)),
            dtype=dtype if job is None else job.config.resources.dtype,
            max_length=min(self.settings.max_length, info.max_length),
            idle_s=self.settings.idle_s,
            lease_s=self._store.engines.lease_s,
            cpus=self.settings.cpus,
            gpus=self.settings.gpus,
            ports=self.settings.ports,
        )

    async def _watch(self, engine: EngineRecord) -> None:
        """What the cluster knows; of the living it may know nothing, which is what the lease is for."""
        if engine.submission_id is None:  # a crash, or a cluster that was away, came between
            await self._submit(engine, self.settings.cpus, self.settings.gpus)
            return
        status = await self._status(engine.submission_id)
        if status in ENDED:
            await self._end(engine, f"its process ended ({status}) without a word")
        elif status in ("pending", "running") and engine.state == "launched":
            await asyncio.to_thread(self._store.engines.note_status, engine.id, status)
        elif status == "unknown" and engine.heartbeat_at is None and self._is_old(engine):
            await self._lose(engine, "the cluster does not know it")

    def _is_old(self, engine: EngineRecord) -> bool:
        """A younger one may have been handed to the cluster a moment ago."""
        return self._store.database.clock() - engine.created_at > self._store.engines.lease_s

    async def _stop(self, engine: EngineRecord) -> None:
        """It hears of it by its heartbeat and from the cluster; what stays silent counts as gone."""
        since = engine.stopping_at or self._store.database.clock()
        if engine.submission_id is not None:
            with suppress(Exception):
                await asyncio.wait_for(
                    self._launcher.stop(engine.submission_id), self.settings.call_timeout_s
                )
            while self._store.database.clock() - since < self.settings.stop_grace_s:
                if await self._status(engine.submission_id) in ENDED:
                    break
                await asyncio.sleep(0.2)
        await self._end(engine, "stopped")

    async def _lose(self, engine: EngineRecord, reason: str) -> None:
        """Void first, then stopped: from then on it can do nothing."""
        await self._end(engine, reason)
        if engine.submission_id is not None:
            with suppress(Exception):
                await asyncio.wait_for(
                    self._launcher.stop(engine.submission_id), self.settings.call_timeout_s
                )

    async def _status(self, submission_id: str) -> LaunchStatus:
        try:
            return await asyncio.wait_for(self._launcher.status(submission_id), self.settings.call_timeout_s)
        except Exception as error:
            log.warning("the cluster is silent about %s: %s", submission_id, error or type(error).__name__)
            return "unknown"

    async def _end(self, engine: EngineRecord, outcome: str, error: Exception | None = None) -> None:
        problem = None
        if error is not None:
            to_dict = getattr(error, "to_dict", None)
            problem = to_dict() if to_dict else {"code": "worker_failed", "message": outcome, "mend": ""}
        await asyncio.to_thread(self._store.engines.end, engine.id, outcome, problem)
        await asyncio.to_thread(shutil.rmtree, self._home.engine_secret(engine.id).parent, ignore_errors=True)

    def _start_task(self, engine: EngineRecord, work: Coroutine[Any, Any, None]) -> None:
        """At most one task per engine."""
        if engine.id in self._tasks:
            work.close()
            return
        task = asyncio.create_task(self._guarded(engine, work))
        self._tasks[engine.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(engine.id, None))

    async def _guarded(self, engine: EngineRecord, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("looking after %s failed; trying again", engine.id)


def job_of_checkpoint(home: Home, path: Path) -> JobSpec | None:
    """The job whose checkpoint this directory is; None for a model."""
    if path.parent.name != "checkpoints" or path.parent.parent.parent.resolve() != home.jobs.resolve():
        return None
    return JobSpec.read(home.config(path.parent.parent.name))
