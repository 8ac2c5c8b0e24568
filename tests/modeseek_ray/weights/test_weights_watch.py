"""What to watch: METHODS.md section 7 has a name for every figure, and README.md's table names what there is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.messages import RouteCounts
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.reports.results import flatten
from modeseek_ray.retention import RetentionCourse
from modeseek_ray.routing.compare import router_load
from modeseek_ray.types import EvalReport, StepReport
from modeseek_ray.weights import Evidence, Weighting, observe, weigh

HERE = Path(__file__).parents[3] / "modeseek_ray" / "weights"
README, METHODS = (HERE / "README.md").read_text(), (HERE / "METHODS.md").read_text()
# Set where the coefficient is known, and where the model is; see test_driver and tests/actors/test_figures.
BY_THE_DRIVER = {"weights.kl_coefficient", "parameter_distance"}
DELTAS = ("mean_abs_delta", "max_abs_delta", "std_delta", "mean_abs_sum_delta", "mean_sum_squared_delta")

# METHODS.md section 7, in its own words -> the names that carry it. `TASK` is a task of the retention file.
SECTION_7: dict[str, tuple[str, ...]] = {
    "weights: ESS/n": ("ess_ratio",),
    "weights: k̂": ("weights.khat",),
    "weights: largest share": ("weights.largest_share",),
    "weights: top-1 % share": ("weights.top1pct_share",),
    "weights: entropy": ("weights.entropy",),
    "weights: starved share": ("weights.starved_share",),
    "weights: correlation with length and with initial NLL": (
        "weights.corr_length",
        "weights.corr_initial_nll",
    ),
    "control: γ or β": ("gamma", "beta"),
    "control: which constraint bound (cap, ESS, warm-up, noise)": ("bound_by", "weights.cap_bound_share"),
    "control: L mean/std/quantiles": (
        "weights.L_mean",
        "weights.L_std",
        *(f"weights.L_q{q}" for q in ("05", "25", "50", "75", "95")),
    ),
    "control: L over repeat noise": ("weights.L_over_noise", "weights.noise_std"),
    "tokens: δ as above": tuple(f"ratio/{name}" for name in DELTAS),
    "tokens: clipped share by side": ("ratio/clipped_low", "ratio/clipped_high"),
    "tokens: χ²": ("ratio/chi_squared",),
    "KL to π_0 on new and old probes, both directions": (
        "validation.kl_nats",
        "validation.kl_reverse_nats",
        "retention.kl_nats",
        "retention.kl_reverse_nats",
    ),
    "loss: weighted": ("loss",),
    "loss: **unweighted** train and validation NLL": ("nll", "validation.nll"),
    "loss: accuracy": ("accuracy", "validation.accuracy"),
    "loss: entropy": ("entropy", "validation.entropy"),
    "optimisation: gradient norm before and after clipping": ("grad_norm", "grad_norm_clipped"),
    "optimisation: ‖θ−θ_0‖": ("parameter_distance",),
    "retention: change of each old task": ("retention.TASK.change",),
    "retention: forgetting = best past − now": ("retention.TASK.forgetting", "retention.forgetting"),
    "MoE: section 6": (
        "routes/changed_token_layers",
        "routes/changed_tokens",
        "routes/overlap",
        "mismatch/kl_k3",
        "mismatch/over_two",
    ),
    "MoE: load variation": ("routes/load_variation",),
    "MoE: dead experts": ("routes/dead_experts",),
}
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
    step = replace(step, grad_norm_clipped=1.0, entropy=1.0)
    task = EvalReport(nll=1.0, token_accuracy=0.5, num_tokens=6, accuracy=0.5)
    file = replace(task, entropy=1.0, kl_nats=0.1, kl_reverse_nats=0.2)
    figures = flatten(step, None, {"validation": file, "retention": replace(file, by_task={"TASK": task})})
    return {name for name in figures if not name.startswith("seconds_")} | set(RetentionCourse().add(figures))


def of_tokens() -> set[str]:
    """Of token ratios and of experts, where a job has them."""
    ratios = DeltaSums(num_tokens=1, num_samples=1)
    load = router_load(np.zeros((1, 1, 1), dtype=np.int16), num_experts=2)
    found = [ratios.figures("ratio"), ratios.figures("mismatch"), RouteCounts(1, 0, 1, 0).figures()]
    return {name for figures in (*found, load.metrics("routes")) for name in figures}


def named_by_methods() -> list[str]:
    """The section's figures, each after the word its part of the list begins with."""
    listed = METHODS[METHODS.index("## 7.") :].split("\n")[1].split(" Healthy ESS/n")[0].rstrip(".")
    found = []
    for part in listed.split(" · "):
        group, colon, figures = part.partition(": ")
        whole = [part] if not colon else re.split(r", (?![^(]*\))", figures)
        found += [f"{group}: {figure}" if colon else figure for figure in whole]
    return found


def test_every_figure_of_section_7_is_in_the_list() -> None:
    assert named_by_methods() == list(SECTION_7)


@pytest.mark.parametrize("figure", SECTION_7)
def test_every_figure_of_section_7_is_measured(figure: str) -> None:
    known = weighed() | reported() | of_tokens() | BY_THE_DRIVER
    assert set(SECTION_7[figure]) <= known


def test_the_table_names_what_there_is() -> None:
    table = README[README.index("## What to watch") : README.index("## Add a scheme")]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    named = {name for line in rows for name in re.findall(r"`([\w.]+)`", line)} - NOT_FIGURES
    shown = {name for name in reported() if ".TASK." not in name}
    assert named - BY_THE_DRIVER == (weighed() | shown) - NOT_IN_THE_TABLE
