"""What an online round adds: answers written, weights handed over. Legend: the package's."""

from __future__ import annotations

import math
from dataclasses import replace

from modeseek_ray.config import JobConfig
from modeseek_ray.jobs import memory
from modeseek_ray.jobs.hardware import Hardware
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.scale.parts import TimePart, link
from modeseek_ray.jobs.scale.training import forward_s
from modeseek_ray.jobs.scale.workload import Workload
from modeseek_ray.weights import needs


def online_parts(config: JobConfig, model: ModelInfo, on: Hardware, work: Workload) -> list[TimePart]:
    if config.online is None:
        return []
    parts = [generation(config, model, on, work, config.resources.generators), _sync(config, model, on)]
    if "initial" in needs(config.weighting):
        scorers = config.resources.scorers
        share = replace(work, positions=work.positions / scorers, trained=work.trained / scorers)
        parts.append(TimePart("score start", forward_s(config, model, on, share), "a forward pass of pi_0"))
    return parts


def generation(config: JobConfig, model: ModelInfo, on: Hardware, work: Workload, engines: int) -> TimePart:
    """Prompts are read at once; then every token reads the weights that are asked and the cache so far.

    As many samples run at a time as the cache has room for; the rest wait for the next wave.
    """
    b, tp = memory.generator_bytes(config.resources), config.resources.tensor_parallel
    dtype = "bfloat16" if b == 2 else "float32"
    per_engine = math.ceil(work.samples / engines)
    at_once = max(
        1,
        min(
            per_engine,
            int(cache_bytes(config, model, on) // (b * max(1, model.kv_values) * work.mean_length)),
        ),
    )
    waves = math.ceil(per_engine / at_once)
    head = model.vocab_size * model.hidden_size
    dense = model.num_active_parameters + head
    if model.num_experts:
        asked = model.num_expert_parameters * model.experts_per_token // model.num_experts
        # Experts that at least one of the samples asks for.
        touched = 1 - (1 - model.experts_per_token / model.num_experts) ** at_once
        dense += round(model.num_expert_parameters * touched) - asked
    read = b * (dense + at_once * model.kv_values * work.mean_length / 2)
    memory_s = read / (tp * on.memory_bandwidth * on.bandwidth_efficiency)
    compute_s = (
        2.0 * (model.num_active_parameters + head) * at_once / (tp * on.flops(dtype, moe=model.is_moe))
    )
    per_token = max(memory_s, compute_s) + on.layer_overhead_s / 4 * model.num_layers
    prefill = (
        2.0 * model.num_active_parameters * work.prompts / engines / (tp * on.flops(dtype, moe=model.is_moe))
    )
    return TimePart(
        "generate",
        prefill + waves * work.longest_written * per_token,
        f"{waves} wave{'s' if waves > 1 else ''} of {at_once} samples x {work.longest_written} tokens,"
        " each max(bytes read / bandwidth, operations / rate)",
    )


def cache_bytes(config: JobConfig, model: ModelInfo, on: Hardware) -> float:
    """Room for keys and values in one engine: what a GPU has left of nine tenths, or `kv_cache_gib`."""
    if not config.resources.gpus_per_worker:
        return config.resources.kv_cache_gib * 2**30
    weights = memory.generator_bytes(config.resources) * model.num_parameters
    whole = config.resources.tensor_parallel * on.memory_bytes * 0.9 * config.resources.gpus_per_worker
    return max(0.0, whole - weights)


def _sync(config: JobConfig, model: ModelInfo, on: Hardware) -> TimePart:
    """Weights gathered on rank 0, sent to every engine, and a canary scored on both sides."""
    resources = config.resources
    b = memory.generator_bytes(resources)
    devices = resources.trainers + resources.generators * resources.tensor_parallel
    is_cut = memory.effective_stage(resources) == 3 and resources.trainers > 1
    num_bytes = b * model.num_parameters
    if resources.weight_transfer == "ipc":
        # Packed, taken out and loaded: three times read and written.
        seconds = 6 * num_bytes / (on.memory_bandwidth * on.bandwidth_efficiency)
        seconds += num_bytes / link(on, resources.trainers) if is_cut else 0.0
        what = "6 b P over the card's memory bandwidth, with ZeRO-3 b P over the slowest link"
        return TimePart("sync", seconds + 2 * on.step_overhead_s, what)
    seconds = (2 if is_cut else 1) * num_bytes / link(on, devices)
    return TimePart("sync", seconds + 2 * on.step_overhead_s, "b P (twice with ZeRO-3) over the slowest link")


def round_seconds(config: JobConfig, parts: list[TimePart]) -> float:
    """With staleness the engines write while the trainers train; the longer of both counts."""
    times = {part.name: part.seconds for part in parts}
    writing = times.pop("generate", 0.0)
    sync = times.pop("sync", 0.0)
    rest = sum(times.values())
    overlaps = config.online is not None and config.online.rollout.max_staleness > 0
    return sync + (max(writing, rest) if overlaps else writing + rest)
