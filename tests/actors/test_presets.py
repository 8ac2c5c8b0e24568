"""Every preset through the real trainer, on the playground's MoE model."""

from __future__ import annotations

import asyncio
import csv
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.attempt import Attempt
from actors.attempt_spec import AttemptSpec
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement
from modeseek_ray.config import parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.playground import data_files
from modeseek_ray.reports.results import METRICS_FILE, TEXT_COLUMNS, WEIGHTS_FILE, Metrics, read_metrics
from modeseek_ray.weights import PRESETS, Weighting, needs
from modeseek_ray.weights.weighting import uses_likelihood

STEPS = 30


def _run(preset: str, model: Path, home: Path, out: Path, cache: Path, **training_changes: int) -> Metrics:
    files = data_files(home)
    rewarded = "rewards" in needs(Weighting(preset=preset))
    training_file = files["new-task.rewarded" if rewarded else "new-task.train"]
    training = {
        "batch_size": 8,
        "learning_rate": 1e-3,
        "epochs": 2,
        "max_steps": STEPS,
        "evaluate_every": STEPS,
        "checkpoint_every": STEPS,
        **training_changes,
    }
    config = parse_config(
        {
            "model": str(model),
            "training_file": str(training_file),
            "method": {"type": "weighted", "weighted": {"preset": preset, "training": training}},
        }
    )
    spec = AttemptSpec(  # the rows' own model stands for their sampler, where a weighting asks for one
        preset, 1, config, {"training_file": training_file}, model, out, cache, behavior_model_path=model
    )
    journal = ResultJournal(out / "results", CallbackSink(lambda event: None))
    asyncio.run(Attempt(spec, LocalPlacement(), journal).run())
    return read_metrics(out / "results")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference scores, shared: the data set is scored once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains_with_finite_figures(
    preset: str, playground_moe: Path, modeseek_home: Path, tmp_path: Path, cache: Path
) -> None:
    inner_steps = 4 if preset == "psft" else 1
    metrics = _run(preset, playground_moe, modeseek_home, tmp_path, cache, inner_steps=inner_steps)
    for name in ("loss", "nll", "grad_norm", "ess_ratio"):
        assert metrics.known(name)[0].tolist() == list(range(1, STEPS + 1))
    with (tmp_path / "results" / METRICS_FILE).open() as file:
        cells = [cell for row in csv.DictReader(file) for cell in row.items() if cell[0] not in TEXT_COLUMNS]
    assert [(name, cell) for name, cell in cells if cell and not math.isfinite(float(cell))] == []
    assert is_no_plain_fine_tuning(preset, metrics, tmp_path / "results")
    assert (metrics.known("grad_norm")[1] > 0).any()
    if inner_steps > 1:
        assert metrics.known("ratio/max_abs_delta")[1].max() > 0.01, (
            "later steps see that the policy has moved"
        )


def is_no_plain_fine_tuning(preset: str, metrics: Metrics, results: Path) -> bool:
    """Whether what makes the preset shows once warm-ups are over: in samples' weights, or between loss and NLL."""
    weighting = Weighting(preset=preset)
    table = pq.read_table(results / WEIGHTS_FILE, columns=["step", "weight"])
    late_N = table["weight"].to_numpy()[table["step"].to_numpy() > STEPS // 5]
    weighs = uses_likelihood(weighting) or weighting.reward.scheme != "uniform"
    if weighs:
        return bool(np.ptp(late_N) > 1e-3 * np.abs(late_N).max())  # relative: a learnt pair's are small
    assert (late_N == 1).all()
    apart = float(np.abs(metrics.known("loss")[1] - metrics.known("nll")[1]).max())
    return apart > 1e-3 or (preset == "sft" and apart < 1e-5)


def test_psft_is_refused_where_it_would_be_plain_fine_tuning(
    playground_moe: Path, modeseek_home: Path, tmp_path: Path, cache: Path
) -> None:
    """One step per batch: the policy is the start of its own inner loop, and every ratio is one."""
    with pytest.raises(ConfigError, match="with one step per batch it is SFT"):
        _run("psft", playground_moe, modeseek_home, tmp_path, cache)
