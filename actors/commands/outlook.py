"""Score a sample of the training data under the start and see what each weighting would make of it.

The same behind `modeseek check --score` and the service's validation process. In this process,
without Ray; scores are cached, so that a job on the same rows finds them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.scoring import ScoringSpec, score_dataset
from modeseek_ray.config import JobConfig
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import ConfigError, NumericsError, Warn
from modeseek_ray.jobs.look import ROWS, LookRequest
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.types import Evidence, FloatArray, IntArray, Sample
from modeseek_ray.weights import Weighting, needs
from modeseek_ray.weights.outlook import Outlook, not_possible, outlook

DEADLINE_S = 6 * 3600.0
SHOWN_BESIDE = ("sft", "flow", "anchored", "mode_seeking")
OWN = "this job"

Progress = Callable[[int, int], None]  # samples done, samples in all


@dataclass(frozen=True)
class Look:
    """Outlooks of several weightings on the same rows; `impossible` are those these rows cannot be weighed by."""

    num_rows_file: int
    num_rows: int
    median_initial_nll: float  # nats per trained token
    outlooks: tuple[Outlook, ...]
    impossible: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_rows_file": self.num_rows_file,
            "num_rows": self.num_rows,
            "median_initial_nll": self.median_initial_nll,
            "outlooks": [seen.to_dict() for seen in self.outlooks],
            "impossible": [dict(each) for each in self.impossible],
        }


def weightings(config: JobConfig, presets: Sequence[str] = ()) -> dict[str, Weighting]:
    """The job's own and the presets asked for, by name. Raises `ConfigError` for one there is not."""
    names = LookRequest.of(presets, param="--preset").presets or SHOWN_BESIDE
    return {OWN: config.weighting, **{name: Weighting(preset=name) for name in names}}


def why_no_look(config: JobConfig) -> Warn | None:
    """Why there is nothing to score before the job runs, if so: ask before `look`. The job itself is sound."""
    if config.rollout is None:
        return None
    return Warn(
        "nothing_to_score",
        f"the rows of training_file are prompts, and a job of type {config.method.type} writes its samples itself:"
        " there is nothing yet to score, so no outlook is given. Run the job for a round or two and look at its"
        " rollouts: a job of type weighted with this weighting and results/rollouts.parquet as training_file.",
        "training_file",
    )


def look(
    config: JobConfig,
    training_file: Path,
    model: Path,
    cache: Path,
    *,
    behavior_model: Path | None = None,
    presets: Sequence[str] = (),
    rows: int = ROWS,
    progress: Progress | None = None,
) -> Look:
    """Score at most `rows` rows (0 = all) and weigh them in each way. Blocks while it scores.

    The rows are drawn prompt by prompt with the job's seed, so the same job sees the same sample.
    For a job that writes its own samples (`why_no_look`) there are no rows.
    """
    chosen = weightings(config, presets)
    samples = _load(config, training_file, model)
    dataset = Dataset([samples[i] for i in draw(Dataset(samples).group_N, rows, config.seed)])

    def score(path: Path) -> FloatArray:
        return asyncio.run(
            score_dataset(
                dataset.samples,
                _scoring_spec(config, path),
                cache_dir=cache / "scores",
                num_scorers=1,
                on_ray=False,
                deadline_s=DEADLINE_S,
                progress=progress,
            )
        )

    dataset = dataset.with_columns(log_reference_N=score(model))
    wants_behavior = any("behavior" in needs(weighting) for weighting in chosen.values())
    if wants_behavior and dataset.log_behavior_N is None and behavior_model is not None:
        dataset = dataset.with_columns(log_behavior_N=score(behavior_model))
    return _weigh(dataset, chosen, len(samples))


def write_look(seen: Look, out: Path, title: str, training_file: Path) -> None:
    """Write the page with plots; the rows it names are shown with their texts."""
    from modeseek_ray.reports.outlook import write_outlook  # matplotlib: not before it is needed

    lead = (
        f"{seen.num_rows:,} of {seen.num_rows_file:,} rows, scored under the start and weighed as one batch."
        f" Median loss {seen.median_initial_nll:.3g} nats per token."
    )
    write_outlook(seen.outlooks, out, title=title, lead=lead, impossible=seen.impossible, texts=training_file)


def draw(group_N: IntArray, rows: int, seed: int) -> IntArray:
    """Positions of whole prompts, drawn until the next would exceed `rows`, in file order; at least one.

    >>> draw(np.array([0, 0, 1, 2]), 0, seed=0).tolist()
    [0, 1, 2, 3]
    """
    if rows == 0 or len(group_N) <= rows:
        return np.arange(len(group_N))
    order_P = np.random.default_rng(seed).permutation(int(group_N.max()) + 1)
    sizes_P = np.bincount(group_N)[order_P]
    count = max(1, int(np.searchsorted(np.cumsum(sizes_P), rows, side="right")))
    return np.flatnonzero(np.isin(group_N, order_P[:count]))


def _weigh(dataset: Dataset, chosen: Mapping[str, Weighting], num_rows_file: int) -> Look:
    evidence = Evidence(
        log_policy_N=None,
        log_reference_N=dataset.log_reference_N,
        num_tokens_N=dataset.num_tokens_N,
        log_behavior_N=dataset.log_behavior_N,
        rewards_N=dataset.rewards_N,
        group_N=dataset.group_N,
        prior_N=dataset.prior_N,
        row_N=dataset.row_N,
    )
    sources = [sample.task or "(no task)" for sample in dataset.samples]
    seen, impossible = [], []
    for name, weighting in chosen.items():
        try:
            seen.append(outlook(evidence, weighting, name=name, length_N=dataset.length_N, source_N=sources))
        except (ConfigError, NumericsError) as error:  # what is not there, or what is and cannot be weighed
            impossible.append(not_possible(name, error, len(dataset)))
    nll_N = -np.asarray(dataset.log_reference_N) / dataset.num_tokens_N
    return Look(num_rows_file, len(dataset), float(np.median(nll_N)), tuple(seen), tuple(impossible))


def _load(config: JobConfig, path: Path, model: Path) -> list[Sample]:
    largest = ModelInfo.read(model).max_length
    limit = min(config.training.max_length or largest, largest)
    return load_samples(path, ChatTokenizer(model), max_length=limit, truncate=config.training.truncate)


def _scoring_spec(config: JobConfig, model: Path) -> ScoringSpec:
    """On this machine's CPU, whatever the job runs on."""
    return ScoringSpec(
        model_path=str(model),
        dtype=config.resources.dtype,
        micro_batch_tokens=config.resources.micro_batch_tokens,
        cpus_per_worker=config.resources.cpus_per_worker,
    )
