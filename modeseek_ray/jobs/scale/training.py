"""A step of the trainers: passes, gradients, Adam, and what ranks send each other. Legend: the package's."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from modeseek_ray.config import JobConfig
from modeseek_ray.jobs import memory
from modeseek_ray.jobs.hardware import Hardware
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.scale.parts import TimePart, link
from modeseek_ray.jobs.scale.workload import Workload
from modeseek_ray.weights import needs


def train_parts(config: JobConfig, model: ModelInfo, on: Hardware, work: Workload) -> list[TimePart]:
    resources, ranks = config.resources, config.resources.trainers
    share = replace(work, positions=work.positions / ranks, trained=work.trained / ranks)
    crowded = _crowding(config, on)
    forward = forward_s(config, model, on, share) * crowded
    lora = config.training.lora is not None
    backward = (1.0 if lora else 2.0) * forward + (forward if resources.gradient_checkpointing else 0.0)
    wanted = needs(config.weighting)
    keeps = resources.keep_graph != "never" and memory.effective_stage(resources) <= 2
    parts = []
    if "policy" in wanted:
        parts.append(TimePart("score policy", forward, "forward: 2 (P_a n + V h m) + 2 T h L n operations"))
    if "policy" not in wanted or not keeps:
        parts.append(TimePart("forward", forward, "2 (P_a n + V h m) + 2 T h L n operations"))
    if (
        memory.trainable_parameters(model, config.training.lora)
        and config.weighting.kl is not None
        and not lora
    ):
        parts.append(TimePart("frozen start", forward, "a forward pass of pi_0"))
    times = ("1 x" if lora else "2 x") + (" + 1 x" if resources.gradient_checkpointing else "")
    parts.append(TimePart("backward", backward, f"{times} the forward"))
    parts.append(_accumulation(config, model, on, share))
    parts.append(_optimizer(config, model, on, crowded))
    parts.append(_communication(config, model, on, share))
    if resources.sequence_parallel > 1:
        passes = sum(part.name in ("score policy", "forward", "frozen start", "backward") for part in parts)
        parts.append(_exchange(config, model, on, share, passes + resources.gradient_checkpointing))
    return parts


def forward_s(config: JobConfig, model: ModelInfo, on: Hardware, share: Workload) -> float:
    """One pass over one rank's share. The head's log-softmax is float32, and on a CPU so are its products."""
    dtype, moe = config.resources.dtype, model.is_moe
    body = 2.0 * model.num_active_parameters * share.positions
    attention = 2.0 * share.mean_length * model.hidden_size * model.num_layers * share.positions
    head = 2.0 * model.vocab_size * model.hidden_size * share.trained
    # In bfloat16 a GPU multiplies the head's chunks in its matrix units (objectives/head.py); the passes over
    # float32 logits between them leave about the share of the peak that experts' small matrices do.
    units = on.name != "cpu" and dtype == "bfloat16"
    head_rate = on.flops(dtype, moe=True) if units else on.flops("float32", moe=False)
    seconds = (body + attention) / on.flops(dtype, moe=moe) + head / head_rate
    micro_batches = max(1, math.ceil(share.positions / config.resources.micro_batch_tokens))
    per_layer = on.layer_overhead_s + on.expert_overhead_s * model.num_experts
    return seconds + micro_batches * model.num_layers * per_layer


def _optimizer(config: JobConfig, model: ModelInfo, on: Hardware, crowded: float) -> TimePart:
    """Adam over gradient, master copy and two moments in float32, of this rank's shard.

    They are 32 bytes of traffic if each is touched once. torch's AdamW takes a pass for each of its operations,
    and gradients are scaled and weights rounded around it: 90 bytes were seen on an H100, and in the memory of
    its host a third of what that could move.
    """
    resources = config.resources
    trainable = memory.trainable_parameters(model, config.training.lora)
    shard = trainable / (resources.trainers if memory.effective_stage(resources) else 1)
    each = 90 if resources.gpus_per_worker else 32
    seconds = each * shard / (on.memory_bandwidth * on.bandwidth_efficiency) * crowded
    formula = f"{each} A / R bytes of memory traffic"
    if resources.offload_optimizer and resources.gpus_per_worker:
        seconds = (8 * shard / on.host_bandwidth + 32 * shard / 30e9) / on.bandwidth_efficiency
        formula = "8 A / R bytes to the host and back, and Adam there at 30 GB/s"
    return TimePart("optimizer", seconds, formula)


def _accumulation(config: JobConfig, model: ModelInfo, on: Hardware, share: Workload) -> TimePart:
    """DeepSpeed copies each micro-batch's bfloat16 gradients and adds them to a float32 sum: some 40 bytes."""
    resources = config.resources
    if resources.dtype != "bfloat16" or not resources.gpus_per_worker:
        return TimePart("gradients", 0.0, "added in place")
    micro_batches = max(1, math.ceil(share.positions / resources.micro_batch_tokens))
    trainable = memory.trainable_parameters(model, config.training.lora)
    seconds = micro_batches * 40 * trainable / (on.memory_bandwidth * on.bandwidth_efficiency)
    return TimePart("gradients", seconds, "40 A bytes of memory traffic per micro-batch")


def _communication(config: JobConfig, model: ModelInfo, on: Hardware, share: Workload) -> TimePart:
    resources, ranks = config.resources, config.resources.trainers
    if ranks == 1:
        return TimePart("between ranks", 0.0, "one rank")
    b, stage = memory.value_bytes(resources), memory.effective_stage(resources)
    trainable = memory.trainable_parameters(model, config.training.lora)
    moved, formula = 2.0 * b * trainable, "2 b A (R - 1) / R: gradients out, parameters back"
    if stage == 3:
        micro_batches = max(1, math.ceil(share.positions / resources.micro_batch_tokens))
        moved = b * trainable + 2.0 * micro_batches * b * model.num_parameters
        formula = "(b A + 2 b P per micro-batch) (R - 1) / R: parameters are gathered forward and backward"
    return TimePart("between ranks", moved * (ranks - 1) / ranks / link(on, ranks), formula)


def _exchange(config: JobConfig, model: ModelInfo, on: Hardware, share: Workload, passes: int) -> TimePart:
    """Ulysses: each pass sends a rank's queries, keys, values and attention's output around its group once."""
    size = config.resources.sequence_parallel
    values = 2 * model.hidden_size * model.num_layers + model.kv_values
    moved = passes * memory.value_bytes(config.resources) * values * share.positions * (size - 1) / size
    formula = "b n (2 h L + keys and values) (s - 1) / s per pass, s ranks that share sequences"
    return TimePart("exchange heads", moved / link(on, size), formula)


def _crowding(config: JobConfig, on: Hardware) -> float:
    """How often a CPU's cores are shared by more threads than there are. GPUs are not shared."""
    if on.name != "cpu":
        return 1.0
    threads = max(1, int(config.resources.cpus_per_worker)) * config.resources.trainers
    return max(1.0, threads / (os.cpu_count() or 1))
