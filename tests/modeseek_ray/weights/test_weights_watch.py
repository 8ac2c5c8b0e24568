"""The table of figures in README.md: all of them exist under these names, and none of ours is left out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from modeseek_ray.reports.results import flatten
from modeseek_ray.retention import RetentionCourse
from modeseek_ray.types import EvalReport, StepReport
from modeseek_ray.weights import Evidence, Weighting, observe, weigh

README = (Path(__file__).parents[3] / "modeseek_ray" / "weights" / "README.md").read_text()
BY_THE_DRIVER = {"weights.kl_coefficient"}  # set where the coefficient is known; see test_driver
NOT_FIGURES = {"max_grad_norm", "retention.TASK", "kl", "step"}
NOT_IN_THE_TABLE = {
    "weights.ess_ratio",
    "num_tokens",
    "padded_share",
    "validation.token_accuracy",
    "retention.token_accuracy",
    "retention.nll",
}


def weighed() -> set[str]:
    """Names from a batch that has everything, over two steps: controllers, guards, replay, ties."""
    rng = np.random.default_rng(0)
    batch = Evidence(
        log_policy_N=rng.normal(-9, 3, 64),
        log_reference_N=np.full(64, -9.0) + rng.normal(0, 1e-3, 64),
        num_tokens_N=rng.integers(1, 9, 64),
        rewards_N=np.round(rng.random(64), 1),
        group_N=np.arange(64) // 4,
        row_N=np.arange(64),
        is_replay_N=np.arange(64) >= 60,
    )
    ess = {"ess": {"floor": 0.5, "warmup": 0.0}}
    weighting = Weighting.model_validate(
        {
            "preset": "mode_seeking",
            "likelihood": {"gamma": ess},
            "reward": {"scheme": "exponential", "beta": {"ess": {"floor": 0.5}}},
            "token": {"scheme": "talr"},
            "guards": {"cap": 5.0, "pareto_smoothing": True},
        }
    )
    at_start = replace(batch, log_policy_N=batch.log_reference_N + rng.normal(0, 1e-4, 64))
    first = weigh(at_start, weighting, progress=0.0)
    second = weigh(batch, weighting, progress=0.5, state=observe(first.state))
    assert second.bound_by == "ess"
    return set(flatten(weights=second))


def reported() -> set[str]:
    step = StepReport(0, 1.0, 1.0, 0.5, 1.0, 1e-3, 6, num_positions=8, kl_nats=0.1, seconds={"total": 1.0})
    file = EvalReport(nll=1.0, token_accuracy=0.5, num_tokens=6, accuracy=0.5)
    figures = flatten(step, None, {"validation": file, "retention": replace(file, kl_nats=0.1)})
    return {name for name in figures if not name.startswith("seconds_")} | set(RetentionCourse().add(figures))


def test_the_table_names_what_there_is() -> None:
    table = README[README.index("## What to watch") : README.index("## Add a scheme")]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    named = {name for line in rows for name in re.findall(r"`([\w.]+)`", line)} - NOT_FIGURES
    assert named - BY_THE_DRIVER == (weighed() | reported()) - NOT_IN_THE_TABLE
