"""What would run where: processes and their memory, steps, tokens, disk. Nothing is started.

An estimate from the model's shape and the data's figures, for `modeseek check` and the validation
route. The formulas are in `memory.py`; `Plan.assumptions` says what they take for granted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from modeseek_ray.config import JobConfig
from modeseek_ray.data.auto import ResolvedTraining, resolve_training
from modeseek_ray.data.report import DataReport
from modeseek_ray.jobs import memory
from modeseek_ray.jobs.memory import Part
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.weights import first_order_ratio, needs

Phase = Literal["score", "train", "whole job"]
LEDGER_BYTES_PER_SAMPLE = 25  # a row of weights.parquet, compressed


@dataclass(frozen=True)
class Processes:
    """Some processes of one kind. A trainer without GPUs has everything in host memory."""

    role: Literal["driver", "scorer", "trainer", "generator"]
    count: int
    phase: Phase
    cpus_each: float
    gpus_each: float
    host: tuple[Part, ...]  # host memory of one of them
    device: tuple[Part, ...] = ()  # memory of its GPU

    @property
    def host_bytes(self) -> int:
        return sum(part.num_bytes for part in self.host)

    @property
    def device_bytes(self) -> int:
        return sum(part.num_bytes for part in self.device)


@dataclass(frozen=True)
class Plan:
    """What a job would take."""

    model: str
    num_parameters: int
    num_trainable: int
    training: ResolvedTraining | None  # None where the number of rows is not known
    picked: tuple[str, ...]  # what "auto" became, a sentence each
    tokens: int | None  # trained tokens over the whole job, replay left out
    processes: tuple[Processes, ...]
    disk: tuple[Part, ...]
    cpus: float  # at the busiest time
    gpus: float
    host_bytes: int
    assumptions: tuple[str, ...]

    @property
    def disk_bytes(self) -> int:
        return sum(part.num_bytes for part in self.disk)

    @property
    def total_steps(self) -> int | None:
        return None if self.training is None else self.training.total_steps

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, with the sums."""
        data = asdict(self)
        for processes, shown in zip(self.processes, data["processes"], strict=True):
            shown |= {"host_bytes": processes.host_bytes, "device_bytes": processes.device_bytes}
        return data | {"disk_bytes": self.disk_bytes, "total_steps": self.total_steps}


def plan(config: JobConfig, model_info: ModelInfo, data_report: DataReport | None = None) -> Plan:
    """Estimate a job. Without a data report steps and tokens stay unknown and micro-batches count as full."""
    trainable = memory.trainable_parameters(model_info, config.training.lora)
    training, picked = _training(config, model_info, data_report)
    processes = [
        _driver(),
        *_scorers(config, model_info),
        *_generators(config, model_info),
        _trainers(config, model_info, training, data_report),
    ]
    busiest = {
        phase: [p for p in processes if p.phase in (phase, "whole job")] for phase in ("score", "train")
    }
    return Plan(
        model=config.model,
        num_parameters=model_info.num_parameters,
        num_trainable=trainable,
        training=training,
        picked=tuple(picked),
        tokens=_tokens(training, data_report),
        processes=tuple(processes),
        disk=tuple(_disk(config, model_info, trainable, training)),
        cpus=max(sum(p.count * p.cpus_each for p in group) for group in busiest.values()),
        gpus=max(sum(p.count * p.gpus_each for p in group) for group in busiest.values()),
        host_bytes=max(sum(p.count * p.host_bytes for p in group) for group in busiest.values()),
        assumptions=memory.ASSUMPTIONS,
    )


def _training(
    config: JobConfig, model: ModelInfo, data: DataReport | None
) -> tuple[ResolvedTraining | None, list[str]]:
    if data is None or data.training.rows == 0:
        return None, []
    return resolve_training(
        config.training,
        num_rows=_num_samples(config, data),
        num_parameters=model.num_parameters,
        has_lora=config.training.lora is not None,
        largest_group=data.training.largest_group,
    )


def _num_samples(config: JobConfig, data: DataReport) -> int:
    """Samples of one epoch: a pair is two, a prompt as many as are written for it."""
    if config.rollout is not None:
        return data.training.rows * config.rollout.samples_per_prompt
    return data.training.rows + data.training.pairs


def _tokens(training: ResolvedTraining | None, data: DataReport | None) -> int | None:
    """Mean trained tokens per row x new rows of all steps."""
    if training is None or data is None or not data.training.samples:
        return None
    new_rows = training.total_steps * training.batch_size * (1 - training.replay_share)
    seen = min(training.epochs * data.training.samples, round(new_rows))
    return round(seen * data.training.trained_tokens / data.training.samples)


def _driver() -> Processes:
    base = Part("process", memory.DRIVER_BASE_BYTES, "Python, Ray, numpy")
    return Processes("driver", 1, "whole job", cpus_each=0.0, gpus_each=0.0, host=(base,))


def _scorers(config: JobConfig, model: ModelInfo) -> list[Processes]:
    """Frozen models that score the data set before trainers are placed, if the weighting looks at that."""
    if not needs(config.weighting) & {"initial", "behavior"}:
        return []
    resources = config.resources
    on_gpu = resources.gpus_per_worker > 0
    positions = resources.micro_batch_tokens
    inference = Part(
        "activations",
        12 * model.hidden_size * memory.value_bytes(resources) * positions,
        f"12 h b x {positions:,} positions, one layer at a time",
    )
    b = memory.value_bytes(resources)
    weights = Part("parameters", b * model.num_parameters, f"{b} P")
    logits = memory.logits_part(model, resources, positions)
    parts = (weights, inference, logits)
    base = Part("process", memory.SCORER_BASE_BYTES, "Python, torch, transformers")
    return [
        Processes(
            "scorer",
            resources.scorers,
            "score",
            cpus_each=resources.cpus_per_worker,
            gpus_each=resources.gpus_per_worker,
            host=(base,) if on_gpu else (base, *parts),
            device=parts if on_gpu else (),
        )
    ]


def _generators(config: JobConfig, model: ModelInfo) -> list[Processes]:
    """vLLM engines: weights once more, and the cache of keys and values."""
    if config.rollout is None:
        return []
    resources = config.resources
    on_gpu = resources.gpus_per_worker > 0
    b = memory.generator_bytes(resources)
    cache = round(resources.kv_cache_gib * 2**30)
    parts = (
        Part("parameters", b * model.num_parameters, f"{b} P"),
        Part("keys and values", cache, "resources.kv_cache_gib"),
    )
    base = Part("process", memory.GENERATOR_BASE_BYTES, "Python, torch, vLLM")
    return [
        Processes(
            "generator",
            resources.generators,
            "train" if config.online is not None else "score",
            cpus_each=resources.cpus_per_worker,
            gpus_each=resources.gpus_per_worker * resources.tensor_parallel,
            host=(base,) if on_gpu else (base, *parts),
            device=parts if on_gpu else (),
        )
    ]


def _trainers(
    config: JobConfig, model: ModelInfo, training: ResolvedTraining | None, data: DataReport | None
) -> Processes:
    resources, ranks = config.resources, config.resources.trainers
    trainable = memory.trainable_parameters(model, config.training.lora)
    optimizer = memory.optimizer_part(trainable, resources, ranks)
    positions = _positions_held(config, training, data)
    parts: list[Part | None] = [
        memory.weights_part(model, resources, ranks),
        memory.gradient_part(trainable, resources, ranks),
        memory.bucket_part(trainable, resources),
        memory.activation_part(model, resources, positions),
        memory.head_part(model, resources, positions),
    ]
    if not resources.gpus_per_worker and _keeps_logits(config):
        parts.append(memory.kept_logits_part(model, positions))
    if _needs_frozen_copy(config):
        b = memory.value_bytes(resources)
        parts.append(Part("frozen start", b * model.num_parameters, f"{b} P, whole on each rank"))
    host = [Part("process", memory.TRAINER_BASE_BYTES, "Python, torch, DeepSpeed")]
    if config.training.lora is None:
        host.append(memory.start_weights_part(model, resources, ranks))
    if config.retention_file is not None or config.validation_file is not None:
        tokens = _file_tokens(data, "retention") + _file_tokens(data, "validation")
        host.append(memory.remembered_part(model, resources, tokens))
    if config.online is not None and config.online.routing_replay is not None:
        host.append(memory.routes_part(model, resources, _round_positions(config, model, data)))
    on_gpu = resources.gpus_per_worker > 0
    offloads = on_gpu and resources.offload_optimizer and memory.effective_stage(resources) > 0
    (host if offloads else parts).append(optimizer)
    known = tuple(part for part in parts if part is not None)
    return Processes(
        "trainer",
        ranks,
        "train",
        cpus_each=resources.cpus_per_worker,
        gpus_each=resources.gpus_per_worker,
        host=tuple(host) if on_gpu else (*host, *known),
        device=known if on_gpu else (),
    )


def _positions_held(config: JobConfig, training: ResolvedTraining | None, data: DataReport | None) -> int:
    """Positions whose activations one rank holds at once.

    One micro-batch; all of the rank's share of a batch where the scoring pass's graph is kept for the
    step (ZeRO <= 2 and a weighting that looks at the policy), as far as the batch is known. Of sequences
    that several ranks share, its own part.
    """
    resources = config.resources
    mean_length = longest = None
    if data is not None and data.training.samples:
        mean_length = data.training.tokens / data.training.samples
        longest = -(-data.training.longest // resources.sequence_parallel)
    micro = resources.micro_batch_tokens
    if resources.micro_batch_size is not None and longest is not None:
        micro = min(micro, resources.micro_batch_size * longest)
    if training is None or mean_length is None:
        return micro
    samples = -(-training.batch_size // resources.trainer_groups)
    share = samples * mean_length / resources.sequence_parallel / (1 - data_padding(data))
    if _keeps_graphs(config):
        return round(share)
    return min(micro, max(round(share), longest or 0))


def _keeps_graphs(config: JobConfig) -> bool:
    """Whether the graphs of a batch's scoring passes wait for its step."""
    resources = config.resources
    wanted = "policy" in needs(config.weighting) and resources.keep_graph != "never"
    scored_as_stepped = config.routing_replay != "R0"  # else under other experts
    return wanted and scored_as_stepped and memory.effective_stage(resources) <= 2


def _keeps_logits(config: JobConfig) -> bool:
    """Whether the loss's gradient at a log-probability is known only after the forward pass (actors/loss.py)."""
    online = config.online
    corrected = online is not None and (online.effective_clip is not None or online.mismatch is not None)
    by_token = config.weighting.token.scheme != "none"
    return _keeps_graphs(config) or by_token or corrected or config.resources.sequence_parallel > 1


def _round_positions(config: JobConfig, model: ModelInfo, data: DataReport | None) -> int:
    """Prompts and answers of a round; answers as long as they may be."""
    rollout = config.rollout
    if rollout is None:
        return 0
    prompt = model.max_length
    if data is not None and data.training.samples:
        prompt = round(data.training.tokens / data.training.samples)
    return rollout.samples_per_round * min(model.max_length, prompt + rollout.max_tokens)


def data_padding(data: DataReport | None) -> float:
    """Estimated share of computed positions that are padding."""
    return 0.0 if data is None else min(0.9, data.training.padding_share)


def _needs_frozen_copy(config: JobConfig) -> bool:
    """Without LoRA, KL to the start and token ratios against it need pi_0 beside the policy."""
    weighting = config.weighting
    asked = weighting.kl is not None or getattr(weighting.token, "scheme", None) == "ratio_token"
    asked = asked or first_order_ratio(weighting) in ("policy_over_initial", "initial_over_policy")
    asked = asked or "distance" in needs(weighting)
    return asked and config.training.lora is None


def _file_tokens(data: DataReport | None, role: Literal["retention", "validation"]) -> int:
    report = None if data is None else data.files.get(role)
    return 0 if report is None else report.trained_tokens


def checkpoint_bytes(config: JobConfig, model: ModelInfo) -> int:
    """What one checkpoint takes, estimated: all parameters and the optimizer's state of all ranks."""
    trainable = memory.trainable_parameters(model, config.training.lora)
    whole = memory.optimizer_part(trainable, config.resources, ranks=1)
    return int(memory.value_bytes(config.resources) * model.num_parameters + whole.num_bytes)


def _disk(
    config: JobConfig, model: ModelInfo, trainable: int, training: ResolvedTraining | None
) -> list[Part]:
    """Checkpoints that are kept and one being written, the export, the ledger."""
    b = memory.value_bytes(config.resources)
    copies = config.training.keep_checkpoints + 1
    whole = memory.optimizer_part(trainable, config.resources, ranks=1)
    checkpoint = checkpoint_bytes(config, model)
    parts = [
        Part("checkpoints", copies * checkpoint, f"{copies} x ({b} P + {whole.formula.split(' /')[0]})"),
        Part("exported model", b * model.num_parameters, f"{b} P"),
    ]
    if training is not None:
        samples = training.total_steps * training.batch_size
        parts.append(
            Part("weights ledger", LEDGER_BYTES_PER_SAMPLE * samples, f"25 bytes x {samples:,} samples")
        )
    return parts
