"""What weighing costs: how it grows, gamma by root finding beside bisection, its share of a training step.

    python -m tests.bench.weighing [--largest 1000000] [--model DIRECTORY] [--no-step] [--json results.json]

Aims: time grows no faster than n log n (log-log slope at most 1.1); gamma at least 5 times faster than 60
halvings of the same interval, and equal to 1e-9; a global batch of 4,096 under 1 % of the step that
follows it; late in a job, when as many rows as `--largest` were met, a batch of 64 takes at most twice
what it takes at the start. Each time is the least of several runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from modeseek_ray.types import Evidence
from modeseek_ray.weights import Weighting, weigh
from modeseek_ray.weights.solve import largest_feasible, log_conditional_ess

FLOOR, CAP = 0.3, 2.0
BATCH = 4096
SMALL = 64
ROW_LENGTH = 24  # tokens, of the playground's new task
STEP_SAMPLES = 32  # the step is measured on so many and scaled: its time is proportional to tokens


@dataclass(frozen=True)
class Root:
    """Gamma found twice."""

    found: float
    bisected: float
    seconds: float
    bisection_seconds: float
    passes: int  # over all n log ratios, by root finding

    @property
    def speed_up(self) -> float:
        return self.bisection_seconds / self.seconds


@dataclass(frozen=True)
class Late:
    """Seconds for a batch of `SMALL`, as the job begins and when `rows` rows were met."""

    rows: int
    first_seconds: float
    late_seconds: float

    @property
    def ratio(self) -> float:
        return self.late_seconds / self.first_seconds


def evidence(size: int) -> Evidence:
    """Log ratios per token of deviation 1, four answers a prompt, rewards, unequal lengths."""
    rng = np.random.default_rng(0)
    num_tokens_N = rng.integers(20, 400, size)
    log_reference_N = -1.5 * num_tokens_N + rng.normal(size=size)
    return Evidence(
        log_policy_N=log_reference_N + num_tokens_N * rng.normal(size=size),
        log_reference_N=log_reference_N,
        num_tokens_N=num_tokens_N,
        rewards_N=rng.integers(0, 2, size).astype(float),
        group_N=np.arange(size) // 4,
        row_N=np.arange(size),
    )


def weighting() -> Weighting:
    """Both controllers at work, the dearest composition: gamma and beta by effective sample size."""
    ess = {"ess": {"floor": FLOOR}}
    return Weighting.model_validate(
        {
            "preset": "mode_seeking",
            "likelihood": {"gamma": {"ess": {"floor": FLOOR, "max": CAP, "warmup": 0.0}}},
            "reward": {"scheme": "exponential", "beta": ess},
        }
    )


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds (one thread does it all), the least of several runs: disturbances only make them longer."""
    least = np.inf
    for _ in range(repeats):
        started = time.process_time()
        work()
        least = min(least, time.process_time() - started)
    return float(least)


def scaling(sizes: list[int]) -> dict[int, float]:
    """Seconds of `weigh` by number of samples."""
    chosen, found = weighting(), {}
    for size in sizes:
        batch = evidence(size)
        found[size] = seconds_of(partial(weigh, batch, chosen), repeats=5 if size <= 100_000 else 2)
    return found


def late_in_the_job(rows: int) -> Late:
    """A small batch weighed with nothing to remember, and with all of `rows` rows met before."""
    batch, chosen = evidence(SMALL), weighting()
    state: Mapping[str, Any] = weigh(evidence(rows), chosen).state
    rng = np.random.default_rng(2)

    def step() -> None:
        nonlocal state
        state = weigh(replace(batch, row_N=rng.integers(0, rows, SMALL)), chosen, state=state).state

    return Late(rows, seconds_of(lambda: weigh(batch, chosen), 20), seconds_of(step, 20))


def slope(seconds: dict[int, float]) -> float:
    """Of log seconds over log n, fitted from 10^4 up: below, fixed costs decide."""
    sizes = [n for n in seconds if n >= 10_000] or list(seconds)
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log([seconds[n] for n in sizes]), 1)[0])


def gamma_root(size: int, repeats: int = 3) -> Root:
    """The same ESS floor met by the product's root finder and by 60 halvings of [0, cap]."""
    ratio_N = np.random.default_rng(1).normal(size=size)
    base_N = np.full(size, 1 / size)
    passes = 0

    def log_ess(gamma: float) -> float:
        nonlocal passes
        passes += 1
        return log_conditional_ess(gamma * ratio_N, base_N)

    found, bound = largest_feasible(log_ess, FLOOR, CAP)
    counted = passes
    if not bound:
        raise RuntimeError("the floor does not bind: there is no root to find")
    return Root(
        found=found,
        bisected=bisect(log_ess),
        seconds=seconds_of(lambda: largest_feasible(log_ess, FLOOR, CAP), repeats),
        bisection_seconds=seconds_of(lambda: bisect(log_ess), max(1, repeats - 1)),
        passes=counted,
    )


def bisect(log_ess: Callable[[float], float]) -> float:
    low, high = 0.0, CAP
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if log_ess(middle) >= np.log(FLOOR) else (low, middle)
    return low


def step_seconds() -> float:
    """A training step of `BATCH` samples of 64 tokens, 12 M parameters, one thread: measured on fewer, scaled."""
    from tests.bench.train_step.__main__ import run
    from tests.bench.train_step.workload import Case, build_model

    case = Case(batch_size=STEP_SAMPLES, length=64, steps=2, threads=1)
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        outcome = run("our_sft", build_model(case, Path(scratch) / "model"), case)
    return min(outcome.cpu_seconds) * BATCH / STEP_SAMPLES


def step_seconds_of(model: Path) -> float:
    """The same of a real model, a playground's for one, on rows of `ROW_LENGTH` tokens as its data have them."""
    from tests.bench.train_step.__main__ import run
    from tests.bench.train_step.workload import Case

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    case = Case(vocabulary=vocabulary, batch_size=256, length=ROW_LENGTH, steps=2, threads=1)
    return min(run("our_sft", model, case).cpu_seconds) * BATCH / case.batch_size


def table(
    seconds: dict[int, float], root: Root, late: Late, batch_s: float, steps: dict[str, float]
) -> Table:
    shown = Table("what", "seen", "aim", title="Weighing")
    for size, value in seconds.items():
        shown.add_row(f"{size:,} samples", f"{value * 1e3:.2f} ms, {value / size * 1e9:,.0f} ns each", "")
    shown.add_row("log-log slope", f"{slope(seconds):.2f}", "at most 1.1")
    shown.add_row(
        "gamma by root finding",
        f"{root.seconds * 1e3:.1f} ms, {root.passes} passes; 60 halvings {root.bisection_seconds * 1e3:.0f} ms",
        "",
    )
    shown.add_row("… times faster", f"{root.speed_up:.1f}", "at least 5")
    shown.add_row("… off by", f"{abs(root.found - root.bisected):.1e}", "at most 1e-9")
    shown.add_row(
        f"late in the job: {SMALL} of {late.rows:,} rows met",
        f"{late.ratio:.2f} times the first: {late.late_seconds * 1e3:.2f} ms",
        "at most 2",
    )
    for of, step_s in steps.items():
        seen = f"{batch_s / step_s:.3%}: {batch_s * 1e3:.1f} ms of {step_s:.1f} s"
        shown.add_row(f"share of a step of {BATCH:,}, {of}", seen, "under 1 %")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--largest", type=int, default=10**6, metavar="N", help="most samples (default: 10^6)"
    )
    parser.add_argument(
        "--no-step", action="store_true", help="leave the training step out: seconds, no torch"
    )
    parser.add_argument("--model", type=Path, help="a model whose training step is measured, too")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    seconds = scaling([n for n in (10**3, 10**4, 10**5, 10**6) if n <= options.largest])
    batch_s = scaling([BATCH])[BATCH]
    root = gamma_root(options.largest)
    late = late_in_the_job(options.largest)
    steps = {} if options.no_step else {"12 M parameters": step_seconds()}
    if options.model is not None:
        steps[options.model.name] = step_seconds_of(options.model)
    Console().print(table(seconds, root, late, batch_s, steps))
    if options.json is not None:
        figures = {
            "weigh_seconds": seconds,
            "slope": slope(seconds),
            "gamma": {**asdict(root), "speed_up": root.speed_up},
            "late": {**asdict(late), "ratio": late.ratio},
            "batch_seconds": batch_s,
            "step_seconds": steps,
        }
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
