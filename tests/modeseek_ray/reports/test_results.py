"""The files of a result directory: written, killed, resumed, read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modeseek_ray.errors import StorageError
from modeseek_ray.reports.results import (
    JobRecord,
    MetricsWriter,
    flatten,
    read_job,
    read_metrics,
    write_job,
)
from modeseek_ray.types import EvalReport, StepReport, Weights


def step_report(step: int, loss: float = 2.0) -> StepReport:
    return StepReport(
        step=step,
        loss=loss,
        nll=1.5,
        accuracy=0.5,
        grad_norm=1.0,
        learning_rate=1e-5,
        num_tokens=60,
        num_padded=20,
        num_positions=100,
        seconds={"forward": 1.0, "backward": 2.0},
    )


def test_flatten_names_every_figure() -> None:
    weights = Weights(
        np.ones(4), gamma=0.5, beta=None, ess_ratio=0.8, bound_by="ess", metrics={"largest_share": 0.25}
    )
    sort = EvalReport(nll=0.5, token_accuracy=0.9, num_tokens=5, accuracy=0.75)
    retention = EvalReport(nll=1.0, token_accuracy=0.6, num_tokens=10, kl_nats=0.02, by_task={"sort": sort})
    row = flatten(step_report(3), weights, {"retention": retention})
    assert row["tokens_per_s"] == 20.0  # 60 tokens in 1 + 2 seconds
    assert row["padded_share"] == 0.2
    assert row["seconds_backward"] == 2.0
    assert row["weights.largest_share"] == 0.25
    assert row["bound_by"] == "ess"
    assert row["retention.sort.accuracy"] == 0.75
    assert row["retention.kl_nats"] == 0.02
    assert "beta" not in row
    assert "retention.accuracy" not in row
    assert "kl_nats" not in row


def test_metrics_round_trip_with_columns_that_come_later(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.append(0, {"validation.nll": 3.0})
    writer.append(1, {"loss": 0.1 + 0.2, "bound_by": "warmup"})
    writer.append(2, {"loss": 0.25, "bound_by": "ess", "validation.nll": 2.0})
    metrics = read_metrics(tmp_path)
    assert metrics.step_S.tolist() == [0, 1, 2]
    assert metrics.known("loss")[1].tolist() == [0.1 + 0.2, 0.25]  # not a digit lost
    assert metrics.texts["bound_by"] == ("", "warmup", "ess")
    assert (metrics.first("validation.nll"), metrics.last("validation.nll")) == (3.0, 2.0)


def test_an_evaluation_completes_the_row_of_its_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.append(step, {"loss": 1.0 / step})
        writer.evaluated(step, {"validation.nll": float(step)})
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    metrics = read_metrics(tmp_path)
    assert metrics.column("loss").tolist() == [1.0, 0.5]
    assert metrics.column("validation.nll").tolist() == [1.0, 2.0]


def test_a_killed_writer_leaves_whole_rows_and_can_be_resumed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.append(step, {"loss": float(step)})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,6.")  # killed in the middle of a line
    assert read_metrics(tmp_path).step_S.tolist() == [1, 2, 3, 4, 5]
    resumed = MetricsWriter(tmp_path)
    resumed.truncate_after(3)
    resumed.append(4, {"loss": 40.0})
    assert read_metrics(tmp_path).column("loss").tolist() == [1.0, 2.0, 3.0, 40.0]


def test_truncating_before_the_first_row_leaves_an_empty_table(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.append(1, {"loss": 1.0})
    writer.truncate_after(0)
    writer.append(1, {"loss": 2.0})
    assert read_metrics(tmp_path).column("loss").tolist() == [2.0]


def test_steps_never_go_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.append(5, {"loss": 1.0})
    with pytest.raises(StorageError, match="step 4 comes after step 5"):
        writer.append(4, {"loss": 1.0})


def test_tasks_are_found_in_the_column_names(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).append(
        0, {"retention.accuracy": 0.9, "retention.sort.accuracy": 1.0, "retention.a.b.accuracy": 0.8}
    )
    assert read_metrics(tmp_path).tasks() == ("sort", "a.b")


def test_job_record_round_trip(tmp_path: Path) -> None:
    record = JobRecord(
        id="ftjob-1",
        name="démo",
        config={"method": {"type": "weighted"}},
        model="playground/moe",
        picked={"epochs": 3},
        warnings=({"code": "starved", "message": "row 3"},),
    )
    write_job(tmp_path, record)
    assert read_job(tmp_path) == record


def test_a_directory_that_is_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no job\.json"):
        read_job(tmp_path)
