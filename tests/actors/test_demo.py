"""When the demo says that a job fell short, and with which jobs it is run. The jobs themselves are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from actors import main
from actors.commands import demo as command
from modeseek_ray.jobs.paths import Home
from modeseek_ray.reports import JobSummary, summarize
from modeseek_ray.reports.record import JobRecord, write_job
from modeseek_ray.reports.results import MetricsWriter

FILES = ("new-task.prompts", "new-task.prompts-valid", "old-tasks.retention")


def ended(directory: Path, *accuracies: float) -> JobSummary:
    """A job that was evaluated so often, with these accuracies on its new task."""
    metrics = MetricsWriter(directory)
    for step, accuracy in enumerate(accuracies):
        metrics.evaluated(step, {"validation.accuracy": accuracy, "validation.nll": 1.0})
    write_job(directory, JobRecord(id="ftjob-1", name="sft", config={}, model="playground/moe"))
    return summarize(directory)


def test_a_new_task_below_its_aim_is_told_by_job(tmp_path: Path) -> None:
    summaries = {
        "sft": ended(tmp_path / "sft", 0.02, 0.8),
        "anchored": ended(tmp_path / "anchored", 0.02, 0.9, 0.79),
        "online": ended(tmp_path / "online", 0.0, 0.0),  # never solved: compared by its loss
    }
    missed = command.unlearnt(summaries)
    assert [text.split(":")[0] for text in missed] == ["anchored", "online"]
    assert "ended at 0.79, below 0.8" in missed[0]


@pytest.mark.parametrize(("last", "enough"), [(0.71, True), (0.69, False)])
def test_the_reward_of_each_seed_has_to_rise(last: float, enough: bool) -> None:
    """From .5, the mean of the first two rounds, to that of the last five."""
    rewards_S = np.array([0.4, 0.6, 0.1, *[last] * 5])
    assert command.rise(rewards_S) == pytest.approx(last - 0.5)
    assert (command.unrewarded({"online, seed 1": rewards_S}) == []) == enough
    assert len(command.unrewarded({"online, seed 1": np.ones(3)})) == 1  # too few rounds to tell


@pytest.mark.parametrize(
    ("arguments", "seeds"),
    [([], []), (["--seeds", "0", "1", "2"], [0, 1, 2]), (["--seeds", "4", "--seeds", "5"], [4, 5])],
)
def test_seeds_as_they_are_typed(
    arguments: list[str], seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(command, "demo", lambda home, **options: asked.update(options) or 1)
    result = CliRunner().invoke(main.app, ["demo", *arguments])
    assert (result.exit_code, asked) == (1, {"keep": False, "seeds": seeds})


def test_numbers_without_the_option_are_refused() -> None:
    assert CliRunner().invoke(main.app, ["demo", "0", "1"]).exit_code == 2


def test_each_seed_is_a_job_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "data_files", lambda storage: dict.fromkeys(FILES, tmp_path / "rows.jsonl"))
    jobs = [command.job("online", Home(tmp_path), seed) for seed in (0, 1)]
    assert [(job.seed, job.suffix) for job in jobs] == [(0, "online"), (1, "online-1")]
