"""Every preset through the real trainer, on the playground's MoE model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.attempt import Attempt, AttemptSpec
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement
from modeseek_ray.config import parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.playground import data_files
from modeseek_ray.reports.results import Metrics, read_metrics
from modeseek_ray.weights import PRESETS, Weighting, needs

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
        steps_S, figures_S = metrics.known(name)
        assert steps_S.tolist() == list(range(1, STEPS + 1))
        assert np.isfinite(figures_S).all(), name
    assert (metrics.known("grad_norm")[1] > 0).any()
    if inner_steps > 1:
        assert metrics.known("ratio/max_abs_delta")[1].max() > 0.01, (
            "later steps see that the policy has moved"
        )


def test_psft_is_refused_where_it_would_be_plain_fine_tuning(
    playground_moe: Path, modeseek_home: Path, tmp_path: Path, cache: Path
) -> None:
    """One step per batch: the policy is the start of its own inner loop, and every ratio is one."""
    with pytest.raises(ConfigError, match="with one step per batch it is SFT"):
        _run("psft", playground_moe, modeseek_home, tmp_path, cache)
