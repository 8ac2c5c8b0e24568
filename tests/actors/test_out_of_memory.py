"""A worker without memory says so by its own code, wherever the error comes from, and how to mend it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from actors.cluster import RayWorker
from modeseek_ray.errors import WorkerError


def too_much() -> RuntimeError:
    """What PyTorch says of more than any machine has."""
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    return failed.value


CAUSES = {
    "numpy": (MemoryError("Unable to allocate 8.00 EiB"), "out_of_memory"),
    "PyTorch on a CPU": (too_much(), "out_of_memory"),
    "PyTorch on a GPU": (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
    "another": (ValueError("shapes differ"), "worker_failed"),
}


def worker(error: Exception) -> RayWorker:
    """Whose actor answers each call with `error`."""

    async def answer() -> None:
        raise error

    handle: Any = SimpleNamespace(step=SimpleNamespace(remote=answer))
    return RayWorker(handle, "trainer rank 1")


@pytest.mark.parametrize("name", CAUSES)
async def test_what_a_rank_raises_is_told_by_its_kind(name: str) -> None:
    cause, code = CAUSES[name]
    with pytest.raises(WorkerError, match="trainer rank 1 failed in step") as failed:
        await worker(RayTaskError("step", "the traceback", cause)).call("step")
    assert failed.value.code == code
    assert ("micro_batch_tokens" in failed.value.mend) == (code == "out_of_memory")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."), "out_of_memory"),
        (RayActorError(error_msg="its process received SIGKILL."), "worker_died"),
    ],
)
async def test_who_killed_it_is_told_where_ray_knows(error: Exception, code: str) -> None:
    with pytest.raises(WorkerError, match="trainer rank 1") as failed:
        await worker(error).call("step")
    assert failed.value.code == code
