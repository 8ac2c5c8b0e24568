"""Whether a job's processes fit, and how GPUs are best divided between trainers and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modeseek_ray.config import JobConfig
from modeseek_ray.data.report import DataReport
from modeseek_ray.jobs.hardware import Hardware
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import Plan, Processes, plan
from modeseek_ray.jobs.scale.parts import TimePart
from modeseek_ray.jobs.scale.rollout import online_parts, round_seconds
from modeseek_ray.jobs.scale.training import train_parts
from modeseek_ray.jobs.scale.workload import workload

SPLITS_SHOWN = 5


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


def fits(found: Plan, on: Hardware) -> bool:
    return all(_enough(p, on) for p in found.processes)


def _enough(processes: Processes, on: Hardware) -> bool:
    """Nine tenths of a device; the rest is fragmentation."""
    if not processes.gpus_each:
        return on.name != "cpu" or processes.host_bytes <= 0.9 * on.memory_bytes
    if processes.role == "generator":  # its cache is what the weights leave
        weights = next(part.num_bytes for part in processes.device if part.name == "parameters")
        return weights < 0.9 * on.memory_bytes * processes.gpus_each
    return processes.device_bytes <= 0.9 * on.memory_bytes * min(1.0, processes.gpus_each)


def splits(
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
    train = train_parts(config, model, on, work)
    online = online_parts(config, model, on, work)
    times: Mapping[str, float] = {part.name: part.seconds for part in online}
    full = {p.role for p in plan(config, model, data).processes if not _enough(p, on)}
    return Split(
        trainers=config.resources.trainers,
        generators=config.resources.generators,
        round_s=round_seconds(config, [*train, *online, TimePart("driver", on.step_overhead_s, "")]),
        train_s=sum(part.seconds for part in train),
        generate_s=times["generate"],
        fits=not full,
        why_not=f"{' and '.join(sorted(full))} out of memory" if full else "",
    )
