"""What `modeseek check --plan` predicts for the playground's models beside what a trainer rank takes here.

    python -m tests.bench.scale

One rank in a process of its own, plain and weighted. Times are medians of the counted steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from modeseek_ray.config import parse_config
from modeseek_ray.data.problems import Problems
from modeseek_ray.data.report import DataReport, FileReport
from modeseek_ray.jobs.hardware import this_cpu
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.scale import scale
from modeseek_ray.playground import locate
from tests.bench.train_step.__main__ import run
from tests.bench.train_step.workload import Case

POLICY = {"likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.5}}


@dataclass(frozen=True)
class Compared:
    """Predicted and measured, of one job."""

    name: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float

    @property
    def time_ratio(self) -> float:
        return self.predicted_s / self.measured_s

    @property
    def memory_ratio(self) -> float:
        return self.predicted_bytes / self.measured_bytes


def report_of(case: Case) -> DataReport:
    """The case's samples, as the data report of a file would have them."""
    rows = case.batch_size * (case.steps + 1)
    found = FileReport("a.jsonl", "training", Problems("a.jsonl"), rows=rows, samples=rows)
    found.tokens, found.trained_tokens = rows * case.length, rows * (case.length - 1)
    found.lengths = [case.length] * rows
    return DataReport({"training": found})


def compare(name: str, model: Path, case: Case, *, weighted: bool) -> Compared:
    """Run it, and predict it from the model's directory and the sizes alone."""
    outcome = run("our_weighted" if weighted else "our_sft", model, case)
    training = {"batch_size": case.batch_size, "epochs": 1}
    block: dict[str, Any] = {"training": training, **(POLICY if weighted else {})}
    config = parse_config(
        {
            "model": str(model),
            "training_file": "a.jsonl",
            "method": {"type": "weighted", "weighted": block},
            "resources": {"cpus_per_worker": float(case.threads)},
        }
    )
    predicted = scale(config, ModelInfo.read(model), this_cpu(case.threads), report_of(case))
    # The contender has no driver.
    driver_s = sum(part.seconds for part in predicted.step if part.name == "driver")
    return Compared(
        name,
        predicted.step_s - driver_s,
        median(outcome.seconds),
        predicted.device_bytes,
        outcome.peak_bytes,
    )


def compare_playground(home: Path, kinds: tuple[str, ...] = ("moe", "dense")) -> list[Compared]:
    found = []
    for kind in kinds:
        model = locate(kind, home)
        assert model is not None, f"build playground/{kind} first: make playground"
        for weighted in (False, True):
            for batch_size, length in ((8, 32), (32, 64)):
                case = Case(vocabulary=1024, batch_size=batch_size, length=length, steps=5, threads=1)
                name = f"{kind}, {'weighted' if weighted else 'plain'}, {batch_size} x {length}"
                found.append(compare(name, model, case, weighted=weighted))
    return found


def main() -> None:
    home = Path(os.environ.get("MODESEEK_HOME", "~/.modeseek")).expanduser()
    table = Table("one trainer", "predicted s", "measured s", "ratio", "predicted MB", "measured MB", "ratio")
    for row in compare_playground(home):
        seconds = (f"{row.predicted_s:.3f}", f"{row.measured_s:.3f}", f"{row.time_ratio:.2f}")
        megabytes = (f"{row.predicted_bytes / 1e6:.0f}", f"{row.measured_bytes / 1e6:.0f}")
        table.add_row(row.name, *seconds, *megabytes, f"{row.memory_ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
