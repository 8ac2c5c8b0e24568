"""Seconds, memory and rates of a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

WARM_UPS = 2


@dataclass(frozen=True)
class Taken:
    """Of one call: the median time, and the most memory the device held meanwhile (None on a CPU)."""

    seconds: float
    peak_bytes: int | None


def finish(device: str) -> None:
    """Wait for what was started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def take(work: Callable[[], Any], device: str, repeats: int) -> Taken:
    """Run it a few times unmeasured, then `repeats` times."""
    for _ in range(WARM_UPS):
        work()
    finish(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        finish(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return Taken(median(seconds), peak)


def matmul_rate(device: str, size: int, repeats: int) -> float:
    """Floating-point operations per second of a square bfloat16 product: what this card really gives."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / take(lambda: a @ b, device, repeats).seconds
