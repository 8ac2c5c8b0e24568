"""What one step is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass

from modeseek_ray.config import JobConfig
from modeseek_ray.data.report import DataReport
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import data_padding, plan


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
