"""What is counted of a contender's rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """The end of a round."""

    wall: float  # seconds
    cpu: float  # of all threads of this process; other processes hardly disturb it
    figures: Mapping[str, Any]


def summarise(steps: Sequence[Step]) -> dict[str, float]:
    """Of the rounds after the first: from the end of its step to the end of the last one."""
    counted = [step.figures for step in steps[1:]]
    wall = steps[-1].wall - steps[0].wall
    written = sum(data["rollout.written"] for data in counted)
    tokens = sum(data["rollout.tokens"] for data in counted)
    trained = sum(data["seconds_total"] for data in counted)
    fastest = min(counted, key=lambda data: data["sync.seconds"] - data["sync.drain_seconds"])
    syncs = {
        name: fastest[f"sync.{name}"]
        for name in ("seconds", "drain_seconds", "gather_seconds", "load_seconds", "verify_seconds", "bytes")
    }
    return {
        "samples_per_second": written / wall,
        "samples_per_cpu_second": written / (steps[-1].cpu - steps[0].cpu),
        "tokens_per_second": tokens / wall,
        "mean_tokens": tokens / written,
        "cut_share": float(np.mean([data["rollout.cut_share"] for data in counted])),
        "wait_share": 1 - trained / wall,
        "step_seconds": trained / len(counted),
        "wall_seconds_per_round": wall / len(counted),
        **{f"sync_{name}": value for name, value in syncs.items()},
        "copy_seconds": copy_seconds(int(syncs["bytes"])),
    }


def copy_seconds(num_bytes: int, repeats: int = 7) -> float:
    """Copying as many bytes from one touched buffer to another, one thread, the fastest."""
    source, target = np.ones(num_bytes, dtype=np.uint8), np.ones(num_bytes, dtype=np.uint8)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - started)
    return min(found)


def route_bytes(rollouts: Path) -> float:
    """Bytes of routes on the wire per token that has a row of them (all but a sample's last)."""
    import pyarrow.parquet as pq

    num_bytes = rows = 0
    for path in rollouts.glob("round-*.parquet"):
        for row in pq.read_table(path, columns=["routes", "routes_shape"]).to_pylist():
            num_bytes += len(row["routes"])
            rows += row["routes_shape"][0]
    return num_bytes / rows
