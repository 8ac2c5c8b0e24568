"""All of a job's times put together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from modeseek_ray.config import JobConfig
from modeseek_ray.data.report import DataReport
from modeseek_ray.jobs.hardware import Hardware
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import data_padding, plan
from modeseek_ray.jobs.scale.division import Split, fits, splits
from modeseek_ray.jobs.scale.parts import TimePart
from modeseek_ray.jobs.scale.rollout import online_parts, round_seconds
from modeseek_ray.jobs.scale.training import forward_s, train_parts
from modeseek_ray.jobs.scale.workload import Workload, workload
from modeseek_ray.weights import needs


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
    step = [*train_parts(config, model, hardware, work), *online_parts(config, model, hardware, work)]
    step.append(TimePart("driver", hardware.step_overhead_s, "per step, whatever its size"))
    once = _once(config, model, hardware, data)
    step_s = round_seconds(config, step)
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
        fits=fits(found, hardware),
        splits=splits(config, model, hardware, data, total_gpus),
        assumptions=_assumptions(hardware, config),
    )


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
    return (TimePart("score the data set", forward_s(config, model, on, share), "a forward pass of pi_0"),)


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
