"""How long a step takes, part by part, and how GPUs are best divided: a scale model, nothing is run.

    P  parameters     P_a  those a position is multiplied with      A  trainable parameters     R  trainers
    n  positions of one rank's share of a batch      m  its trained ones      T  mean length of a sample
    L  layers     h  width     V  vocabulary     b  bytes per value     G  engines

Operations: a matrix product costs two per parameter and position; backward twice the forward; with
gradient checkpointing one forward more; with LoRA half the backward (no gradients of frozen weights).
Attention adds 2 T h L per position (causal: half of 4 T h L). Communication is ZeRO's (Rajbhandari et
al. 2020, 1910.02054): reduce-scatter and all-gather move (R - 1) / R of what they are given, and
nothing is taken to overlap with computing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from modeseek_ray.config import JobConfig
from modeseek_ray.data.report import DataReport
from modeseek_ray.jobs import memory
from modeseek_ray.jobs.hardware import Hardware
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import Plan, Processes, data_padding, plan
from modeseek_ray.weights import needs

SPLITS_SHOWN = 5


@dataclass(frozen=True)
class TimePart:
    """One share of a step's time."""

    name: str
    seconds: float
    formula: str


@dataclass(frozen=True)
class Split:
    """So many GPUs for trainers, so many for engines, and what a round then takes."""

    trainers: int
    generators: int
    round_s: float
    train_s: float
    generate_s: float
    fits: bool
    why_not: str = ""


@dataclass(frozen=True)
class Scale:
    """Times of a job on some hardware. All seconds; `step` adds up to `step_s` where nothing overlaps."""

    hardware: Hardware
    step: tuple[TimePart, ...]
    once: tuple[TimePart, ...]  # before the first step
    step_s: float
    job_s: float | None  # None where the number of steps is not known
    tokens_per_s: float | None  # trained
    device_bytes: int  # of the fullest device; on a CPU, of the fullest process
    fits: bool
    splits: tuple[Split, ...]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """What one step is asked to compute, over all ranks."""

    samples: int
    positions: float  # padding included
    trained: float
    mean_length: float
    written: float  # tokens that engines write per round; 0 offline
    longest_written: int
    prompts: float  # tokens of all prompts that engines read


def workload(config: JobConfig, model: ModelInfo, data: DataReport | None) -> Workload:
    """From the data where it is known; else full samples of the longest length, half of it trained.

    An engine's answers are taken to be `rollout.max_tokens` long: an upper bound.
    """
    training = config.training
    rows = None if data is None or not data.training.samples else data.training
    longest = min(training.max_length or model.max_length, model.max_length)
    mean_length = longest if rows is None else rows.tokens / rows.samples
    trained_share = 0.5 if rows is None else rows.trained_tokens / rows.tokens
    if config.rollout is not None:
        samples, written = config.rollout.samples_per_round, config.rollout.max_tokens
        prompt = min(mean_length, max(1, longest - written))
        length = prompt + written
        return Workload(
            samples,
            samples * length,
            samples * written,
            length,
            written=samples * written,
            longest_written=written,
            prompts=samples * prompt,
        )
    found = plan(config, model, data).training
    samples = found.batch_size if found else 32 if training.batch_size == "auto" else int(training.batch_size)
    positions = samples * mean_length / (1 - data_padding(data))
    return Workload(samples, positions, samples * mean_length * trained_share, mean_length, 0.0, 0, 0.0)


def scale(
    config: JobConfig,
    model: ModelInfo,
    hardware: Hardware,
    data: DataReport | None = None,
    *,
    total_gpus: int | None = None,
) -> Scale:
    """Estimate a job on `hardware`. With `total_gpus`, an online job's best division of them is searched."""
    found = plan(config, model, data)
    work = workload(config, model, data)
    step = [*_train_parts(config, model, hardware, work), *_online_parts(config, model, hardware, work)]
    step.append(TimePart("driver", hardware.step_overhead_s, "per step, whatever its size"))
    once = _once(config, model, hardware, data)
    step_s = _round_seconds(config, step)
    steps = found.total_steps
    fullest = max(p.device_bytes or p.host_bytes for p in found.processes)
    return Scale(
        hardware=hardware,
        step=tuple(part for part in step if part.seconds > 0),
        once=once,
        step_s=step_s,
        job_s=None if steps is None else steps * step_s + sum(part.seconds for part in once),
        tokens_per_s=work.trained / step_s,
        device_bytes=fullest,
        fits=_fits(found, hardware),
        splits=_splits(config, model, hardware, data, total_gpus),
        assumptions=_assumptions(hardware, config),
    )


# --- training


def _train_parts(config: JobConfig, model: ModelInfo, on: Hardware, work: Workload) -> list[TimePart]:
    resources, ranks = config.resources, config.resources.trainers
    share = Workload(**{**asdict(work), "positions": work.positions / ranks, "trained": work.trained / ranks})
    crowded = _crowding(config, on)
    forward = _forward_s(config, model, on, share) * crowded
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


def _forward_s(config: JobConfig, model: ModelInfo, on: Hardware, share: Workload) -> float:
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
    return TimePart("between ranks", moved * (ranks - 1) / ranks / _link(on, ranks), formula)


def _exchange(config: JobConfig, model: ModelInfo, on: Hardware, share: Workload, passes: int) -> TimePart:
    """Ulysses: each pass sends a rank's queries, keys, values and attention's output around its group once."""
    size = config.resources.sequence_parallel
    values = 2 * model.hidden_size * model.num_layers + model.kv_values
    moved = passes * memory.value_bytes(config.resources) * values * share.positions * (size - 1) / size
    formula = "b n (2 h L + keys and values) (s - 1) / s per pass, s ranks that share sequences"
    return TimePart("exchange heads", moved / _link(on, size), formula)


def _link(on: Hardware, devices: int) -> float:
    """Bytes/s that the slowest step of a ring over so many devices moves."""
    inside = devices <= on.devices_per_node
    return (on.link_bandwidth if inside else on.network_bandwidth) * on.bandwidth_efficiency


def _crowding(config: JobConfig, on: Hardware) -> float:
    """How often a CPU's cores are shared by more threads than there are. GPUs are not shared."""
    if on.name != "cpu":
        return 1.0
    threads = max(1, int(config.resources.cpus_per_worker)) * config.resources.trainers
    return max(1.0, threads / (os.cpu_count() or 1))


# --- what an online round adds


def _online_parts(config: JobConfig, model: ModelInfo, on: Hardware, work: Workload) -> list[TimePart]:
    if config.online is None:
        return []
    parts = [generation(config, model, on, work, config.resources.generators), _sync(config, model, on)]
    if "initial" in needs(config.weighting):
        scorers = config.resources.scorers
        share = replace(work, positions=work.positions / scorers, trained=work.trained / scorers)
        parts.append(TimePart("score start", _forward_s(config, model, on, share), "a forward pass of pi_0"))
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
        seconds += num_bytes / _link(on, resources.trainers) if is_cut else 0.0
        what = "6 b P over the card's memory bandwidth, with ZeRO-3 b P over the slowest link"
        return TimePart("sync", seconds + 2 * on.step_overhead_s, what)
    seconds = (2 if is_cut else 1) * num_bytes / _link(on, devices)
    return TimePart("sync", seconds + 2 * on.step_overhead_s, "b P (twice with ZeRO-3) over the slowest link")


def _round_seconds(config: JobConfig, parts: list[TimePart]) -> float:
    """With staleness the engines write while the trainers train; the longer of both counts."""
    times = {part.name: part.seconds for part in parts}
    writing = times.pop("generate", 0.0)
    sync = times.pop("sync", 0.0)
    rest = sum(times.values())
    overlaps = config.online is not None and config.online.rollout.max_staleness > 0
    return sync + (max(writing, rest) if overlaps else writing + rest)


def _once(config: JobConfig, model: ModelInfo, on: Hardware, data: DataReport | None) -> tuple[TimePart, ...]:
    """The data set under the frozen start: once, then cached."""
    if config.online is not None or "initial" not in needs(config.weighting):
        return ()
    if data is None or not data.training.samples:
        return ()
    rows, scorers = data.training, config.resources.scorers
    share = Workload(
        rows.samples,
        rows.tokens / (1 - data_padding(data)) / scorers,
        rows.trained_tokens / scorers,
        rows.tokens / rows.samples,
        0.0,
        0,
        0.0,
    )
    return (TimePart("score the data set", _forward_s(config, model, on, share), "a forward pass of pi_0"),)


# --- memory, and dividing GPUs


def _fits(found: Plan, on: Hardware) -> bool:
    return all(_enough(p, on) for p in found.processes)


def _enough(processes: Processes, on: Hardware) -> bool:
    """Nine tenths of a device; the rest is fragmentation."""
    if not processes.gpus_each:
        return on.name != "cpu" or processes.host_bytes <= 0.9 * on.memory_bytes
    if processes.role == "generator":  # its cache is what the weights leave
        weights = next(part.num_bytes for part in processes.device if part.name == "parameters")
        return weights < 0.9 * on.memory_bytes * processes.gpus_each
    return processes.device_bytes <= 0.9 * on.memory_bytes * min(1.0, processes.gpus_each)


def _splits(
    config: JobConfig, model: ModelInfo, on: Hardware, data: DataReport | None, total: int | None
) -> tuple[Split, ...]:
    """Every division of `total` GPUs into trainers and engines, the fastest that fit first."""
    if total is None or config.online is None or not config.resources.gpus_per_worker:
        return ()
    tp = config.resources.tensor_parallel
    found = []
    for generators in range(1, (total - 1) // tp + 1):
        trainers = total - generators * tp
        if trainers < 1 or trainers % config.resources.sequence_parallel:
            continue
        resources = config.resources.model_copy(update={"trainers": trainers, "generators": generators})
        divided = config.model_copy(update={"resources": resources})
        found.append(_split(divided, model, on, data))
    found.sort(key=lambda split: (not split.fits, split.round_s))
    return tuple(found[:SPLITS_SHOWN])


def _split(config: JobConfig, model: ModelInfo, on: Hardware, data: DataReport | None) -> Split:
    work = workload(config, model, data)
    train = _train_parts(config, model, on, work)
    online = _online_parts(config, model, on, work)
    times: Mapping[str, float] = {part.name: part.seconds for part in online}
    full = {p.role for p in plan(config, model, data).processes if not _enough(p, on)}
    return Split(
        trainers=config.resources.trainers,
        generators=config.resources.generators,
        round_s=_round_seconds(config, [*train, *online, TimePart("driver", on.step_overhead_s, "")]),
        train_s=sum(part.seconds for part in train),
        generate_s=times["generate"],
        fits=not full,
        why_not=f"{' and '.join(sorted(full))} out of memory" if full else "",
    )


def _assumptions(on: Hardware, config: JobConfig) -> tuple[str, ...]:
    written = (
        "Answers are taken to be max_tokens long, and graders to take no time.",
        "Samples that do not fit an engine's cache wait for the next wave.",
    )
    return (
        f"{on.name}: {on.flops_bfloat16 / 1e9:,.4g} GFLOP/s in bfloat16, {on.flops_float32 / 1e9:,.4g} in float32,"
        f" {on.memory_bandwidth / 1e9:.4g} GB/s of memory, {on.link_bandwidth / 1e9:.4g} GB/s to a device of the"
        f" same node, {on.network_bandwidth / 1e9:.4g} to another ({on.source}).",
        f"Of the peak, {on.efficiency:.0%} is reached by dense models and {on.efficiency_moe:.0%} by mixtures of"
        f" experts; of bandwidths {on.bandwidth_efficiency:.0%}. Each layer and pass costs"
        f" {1e3 * on.layer_overhead_s:.2g} ms more, each step {1e3 * on.step_overhead_s:.0f} ms.",
        "Nothing between ranks overlaps with computing. Evaluations and checkpoints are not counted.",
        *(written if config.rollout is not None else ()),
    )
