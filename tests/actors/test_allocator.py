"""Freed memory goes back to the operating system where there is enough of it to matter."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from actors import allocator
from modeseek_ray.types import Sample
from tests.actors import ranks as inside
from tests.actors.ranks import Start, plan_for

# Blocks of 1 MiB, below the limit from which glibc maps a block on its own; one of 256 KiB on top
# of them keeps the heap from shrinking by itself.
MEASURE = """
import ctypes, sys
from actors.allocator import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
blocks = [libc.malloc(2**20) for _ in range(int(sys.argv[1]))]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
top = libc.malloc(2**18)
for block in blocks:
    libc.free(block)
before = resident_mib()
return_freed_memory()
print(before - resident_mib())
"""


def returned_mib(blocks: int) -> float:
    command = [sys.executable, "-c", MEASURE, str(blocks)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_heap_with_holes_shrinks() -> None:
    assert returned_mib(192) > (150 if platform.libc_ver()[0] == "glibc" else -1)


def test_a_small_heap_is_left_alone_because_its_pages_would_be_mapped_again_in_the_next_step() -> None:
    assert returned_mib(64) < 8


@pytest.mark.parametrize(("rows", "trained", "returned"), [(300, True, 1), (300, False, 0), (200, True, 0)])
def test_memory_is_returned_where_the_backward_pass_reaches_large_embeddings(
    monkeypatch: pytest.MonkeyPatch, rows: int, trained: bool, returned: int
) -> None:
    calls = []
    monkeypatch.setattr(allocator, "return_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(allocator, "LARGE_EMBEDDINGS_BYTES", 256 * 8 * 4)
    embeddings = nn.Embedding(rows, 8).requires_grad_(trained)
    allocator.return_memory_at_embeddings(embeddings)
    hidden = embeddings(torch.tensor([1, 2])) * torch.ones(8, requires_grad=True)
    assert not calls
    hidden.sum().backward()
    assert len(calls) == returned


@pytest.mark.slow
def test_a_trainer_s_embeddings_are_watched(start: Start, samples: list[Sample]) -> None:
    """Once for each micro-batch of a step."""
    start().inside(inside.watch_returned_memory, 1)
    trainer = start(micro_batch_size=4)  # in the same process
    trainer.step(samples, plan_for(samples))
    assert trainer.inside(inside.returns) == [2]
    trainer.inside(inside.watch_returned_memory, allocator.LARGE_EMBEDDINGS_BYTES)
