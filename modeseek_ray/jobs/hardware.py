"""What machines can do: published figures of GPUs, and this machine's cores, measured.

Rates are per device (a GPU, or the threads of one worker on a CPU), in decimal units. The published
ones are dense peaks of the makers' data sheets; how much of a peak is reached is an assumption of
its own (`efficiency`), and is printed with every answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

from modeseek_ray.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One kind of device and how devices are connected. Bytes, bytes/s, floating-point operations/s."""

    name: str
    flops_float32: float
    flops_bfloat16: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float  # between devices of a node, one direction
    network_bandwidth: float  # of one device to another node, one direction
    host_bandwidth: float  # between a device and its host's memory, one direction
    devices_per_node: int
    source: str
    efficiency: float = (
        0.4  # share of peak operations that training reaches: 0.38-0.43 in Llama 3 (2407.21783)
    )
    efficiency_moe: float = 0.25  # the same with small matrices per expert
    bandwidth_efficiency: float = 0.6  # share of peak bandwidth, of memory and of links
    layer_overhead_s: float = (
        2e-4  # per layer and pass, whatever its size: launching some 20 kernels from Python
    )
    expert_overhead_s: float = (
        0.0  # more per expert and layer, where experts are computed one after the other
    )
    step_overhead_s: float = 0.03  # driver, Ray and bookkeeping

    def flops(self, dtype: str, *, moe: bool) -> float:
        """Operations per second that can be expected."""
        peak = self.flops_bfloat16 if dtype == "bfloat16" else self.flops_float32
        return peak * (self.efficiency_moe if moe else self.efficiency)


def _gpu(
    name: str, f32: float, bf16: float, gigabytes: float, memory: float, link: float, network: float
) -> Hardware:
    """TFLOP/s, GB, TB/s and GB/s as the data sheets have them."""
    return Hardware(
        name,
        flops_float32=f32 * 1e12,
        flops_bfloat16=bf16 * 1e12,
        memory_bytes=gigabytes * 1e9,
        memory_bandwidth=memory * 1e12,
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        host_bandwidth=(25e9 if name == "a100" else 55e9),
        devices_per_node=8,
        source=f"NVIDIA's data sheet of the {name.upper()} SXM; network of a usual 8-GPU server",
    )


# float32 without TF32, bfloat16 dense; half of NVLink's sum of both directions; a network card per GPU.
PUBLISHED = {
    "a100": _gpu("a100", 19.5, 312, 80, 2.04, 300, 25),
    "h100": _gpu("h100", 67, 989, 80, 3.35, 450, 50),
    "h200": _gpu("h200", 67, 989, 141, 4.8, 450, 50),
    "b200": _gpu("b200", 75, 2250, 180, 7.7, 900, 50),
}


def hardware_of(name: str, *, threads: int = 1) -> Hardware:
    """By name; `cpu` measures this machine (a second, once a process). Raises `ConfigError`."""
    if name == "cpu":
        return this_cpu(threads)
    if name not in PUBLISHED:
        raise ConfigError(
            f"no figures of {name!r} are known.",
            param="--hardware",
            mend=f"Choose one of: cpu, {', '.join(PUBLISHED)}.",
        )
    return PUBLISHED[name]


_MEASURE = """
import json, time
import numpy as np
rng = np.random.default_rng(0)
def best(work, count=5):
    times = []
    for _ in range(count):
        start = time.perf_counter(); work(); times.append(time.perf_counter() - start)
    return min(times)
# The shape of a small model's layer: the rate grows with it, and small models are what runs on CPUs.
a, b = rng.random((1024, 128), np.float32), rng.random((128, 384), np.float32)
flops = 20 * 2 * 1024 * 128 * 384 / best(lambda: [a @ b for _ in range(20)])
x = np.zeros(16_000_000, np.float32); y = np.zeros_like(x)
bandwidth = 2 * x.nbytes / best(lambda: np.copyto(y, x))
print(json.dumps({"flops": flops, "bandwidth": bandwidth}))
"""


@cache
def this_cpu(threads: int = 1) -> Hardware:
    """This machine with `threads` per worker: matrix products and copies timed in a process of their own.

    The overheads are of transformers' modules in PyTorch, seen on a machine of two cores, where they
    are most of a small model's time.
    """
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(variables, str(threads))}
    measured = json.loads(
        subprocess.run(
            [sys.executable, "-c", _MEASURE], env=environment, capture_output=True, check=True, timeout=120
        ).stdout
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(
        "cpu",
        flops_float32=measured["flops"],
        flops_bfloat16=measured["flops"] / 4,  # emulated where the cores have no instruction for it
        memory_bytes=float(pages),
        memory_bandwidth=measured["bandwidth"],
        link_bandwidth=measured["bandwidth"] / 4,  # gloo and Ray's object store copy several times
        network_bandwidth=1.25e9,
        host_bandwidth=measured["bandwidth"],
        devices_per_node=os.cpu_count() or 1,
        source=f"measured here with {threads} thread{'s' if threads > 1 else ''} a worker",
        efficiency=0.5,
        efficiency_moe=0.35,
        bandwidth_efficiency=0.5,
        layer_overhead_s=1e-3,
        expert_overhead_s=2e-4,
        step_overhead_s=0.02,
    )
