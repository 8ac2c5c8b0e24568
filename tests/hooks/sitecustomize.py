"""Kill points, put into real processes from outside: nothing of this is in the shipped code.

Python imports this file in every process that has this directory on its path: the service, drivers,
trainer ranks. Where `MODESEEK_FAULT_PLAN` names a file, the functions of `POINTS` are wrapped as their
modules are imported; at each call the file is read, and what it asks for is done once:

    {"point": "rank.step", "when": "before", "nth": 3, "rank": 1, "action": "SIGKILL"}

`nth` counts the calls of one process. That the fault has happened is written beside the plan (`.fired`)
before anything is done, so that the next attempt meets none. Where `MODESEEK_TEST_ZYGOTE` names a socket,
Ray's workers, `modeseek` commands and modules of the tests are forks of the zygote (`zygote.py`), which has
imported their packages.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

# Name of a point -> where it is. "before" a function, or "after" it has returned.
POINTS = {
    "driver.setup": "actors.driver:Driver._prepare",
    "driver.score": "actors.attempt:Attempt._score",
    "driver.step": "actors.driver:Driver._train",
    "driver.save": "actors.driver:Driver._save",
    "driver.finish": "actors.checkpoint:CheckpointStore.finish",  # hash, rename, prune
    "driver.commit": "actors.http_sink:HttpSink.checkpoint",  # before: renamed; after: committed
    "driver.export": "actors.attempt:Attempt._export",
    "driver.check": "actors.attempt:Attempt._check_export",
    "driver.end": "actors.http_sink:HttpSink.transition",
    "driver.rollout": "actors.rollouts:RolloutStore.write",
    "driver.sync": "actors.driver:Driver._sync",
    "engine.write": "actors.generator:GeneratorEngine.turn",
    "engine.update": "actors.generator:GeneratorEngine.finish_update",
    "scorer.block": "actors.scoring:BlockScorer.__call__",
    "rank.step": "actors.trainer:TrainerRank.step",
    "rank.save": "actors.trainer:TrainerRank.save",
    "rank.weights": "actors.trainer:TrainerRank.weights",
    "rank.export": "actors.trainer:TrainerRank.export",
    "api.commit": "modeseek_ray.jobs.driver_store:DriverStore.commit_checkpoint",
    "api.events": "modeseek_ray.jobs.driver_store:DriverStore.append_events",
    "api.transition": "modeseek_ray.jobs.driver_store:DriverStore.transition",
    "api.submit": "modeseek_ray.jobs.job_store:JobStore.submit",
    "api.begin": "modeseek_ray.jobs.attempt_store:AttemptStore.begin",
}
_PLAN = os.environ.get("MODESEEK_FAULT_PLAN")
_calls: Counter[tuple[str, str]] = Counter()


def _meet(point: str, when: str, instance: object) -> None:
    """Do what the plan asks for at this call, if it asks for anything."""
    assert _PLAN is not None
    try:
        plan = json.loads(Path(_PLAN).read_text())
    except (OSError, ValueError):
        return
    if (plan.get("point"), plan.get("when")) != (point, when):
        return
    if "rank" in plan and getattr(instance, "_rank", None) != plan["rank"]:
        return
    _calls[point, when] += 1
    if _calls[point, when] != plan["nth"]:
        return
    try:
        with Path(f"{_PLAN}.fired").open("x") as fired:
            json.dump({"pid": os.getpid(), "at": time.time()}, fired)
    except FileExistsError:
        return
    _ACTIONS[plan["action"]](plan)


def _full(_plan: dict[str, Any]) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/a/full/disk")


def _fill(plan: dict[str, Any]) -> None:
    """No byte left on the volume; where it could not be mounted, none that this process may add, for a while."""
    directory = Path(plan["directory"])
    if not directory.is_mount():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        lift = threading.Timer(plan["seconds"], resource.setrlimit, (resource.RLIMIT_FSIZE, (soft, hard)))
        lift.daemon = True
        lift.start()
        return
    with suppress(OSError), (directory / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while ballast.write(bytes(size)) == size:
                    pass


def _stall(plan: dict[str, Any]) -> None:
    """Stop, and go on later: to a process it looks as if the machine had slept."""
    wake = f"sleep {plan['seconds']}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", wake], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _end_ray(_plan: dict[str, Any]) -> None:
    """Ray's head and all that it has started, this process perhaps among them."""
    import psutil

    head = json.loads((Path(os.environ["MODESEEK_FAULT_HOME"]) / "ray" / "head.json").read_text())
    process = psutil.Process(head["pid"])
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            member.kill()


_ACTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "SIGKILL": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "STALL": _stall,
    "SLOW": lambda plan: time.sleep(plan["seconds"]),
    "ENOSPC": _full,
    "FULL": _fill,
    "RAY": _end_ray,
}


def _wrap(point: str, function):  # type: ignore[no-untyped-def]
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            _meet(point, "before", self)
            result = await function(self, *args, **kwargs)
            _meet(point, "after", self)
            return result

    elif inspect.isgeneratorfunction(function):  # "before" its first item, "after" its last

        @functools.wraps(function)
        def wrapped(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            _meet(point, "before", self)
            yield from function(self, *args, **kwargs)
            _meet(point, "after", self)

    else:

        @functools.wraps(function)
        def wrapped(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            _meet(point, "before", self)
            result = function(self, *args, **kwargs)
            _meet(point, "after", self)
            return result

    return wrapped


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `POINTS` as usual, and wraps their functions once they are loaded."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        wanted = {point: place for point, place in POINTS.items() if place.split(":")[0] == name}
        spec = PathFinder.find_spec(name, path, target) if wanted else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_wrap(module):  # type: ignore[no-untyped-def]
            load(module)
            for point, place in wanted.items():
                class_name, method = place.split(":")[1].split(".")
                owner = getattr(module, class_name)
                setattr(owner, method, _wrap(point, getattr(owner, method)))

        spec.loader.exec_module = load_and_wrap
        return spec


if _PLAN:
    sys.meta_path.insert(0, _Finder())


_ZYGOTE = os.environ.get("MODESEEK_TEST_ZYGOTE")
_FORKED = ("setup_worker.py", "default_worker.py", "actors.main", "tests.")


def _is_forked(argv: list[str]) -> bool:
    """Whether the zygote can run this: Ray's workers, `modeseek` commands, modules of the tests."""
    script = next((argument for argument in argv[1:] if not argument.startswith("-")), "")
    return Path(script).name.startswith(_FORKED)


if _ZYGOTE and _is_forked(sys.orig_argv):
    sys.path.insert(0, str(Path(__file__).parent))
    import zygote

    os._exit(zygote.stand_in(_ZYGOTE))
