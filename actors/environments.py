"""Variables of workers, set by Ray before they import torch, DeepSpeed or vLLM, which read them then."""

from __future__ import annotations

from actors.generator import GeneratorSpec
from actors.vllm_engine import environment as vllm_environment
from modeseek_ray.config import Resources

# How often an OpenMP thread looks for work before it sleeps: a fraction of a millisecond. One that sleeps at once has
# to be woken for each of the hundreds of small kernels of a decoding step (vLLM wrote a tenth less on two threads, 578
# and 640 tokens/s); one that spins for as long as libgomp likes, thirty times this, starves the other workers.
_SPINS = 10_000


def scorer_environment(num_threads: int) -> dict[str, str]:
    """For torch on a machine that is shared."""
    return {**_threads(num_threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def trainer_environment(resources: Resources) -> dict[str, str]:
    """For torch and DeepSpeed."""
    environment = scorer_environment(max(1, int(resources.cpus_per_worker)))
    if not resources.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def generator_environment(spec: GeneratorSpec) -> dict[str, str]:
    """For vLLM."""
    return {**_threads(max(1, int(spec.cpus_per_worker))), **vllm_environment(spec)}


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "GOMP_SPINCOUNT": str(_SPINS)}
