"""A job's result directory: `metrics.csv`, `weights.parquet`, `job.json`. Writers and readers together.

The writers are safe to kill at any moment and to resume from an earlier checkpoint: after
`truncate_after(step)` the files hold what they held when `step` was finished. The readers accept a
directory that is still being written, so a report of a running job is possible.

`flatten` gives a step's figures their public names; events, CSV and live views all use it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.errors import StorageError
from modeseek_ray.reports.ledger import WEIGHTS_FILE, WeightsWriter, read_weights
from modeseek_ray.reports.record import JOB_FILE, JobRecord, read_job, write_atomically, write_job
from modeseek_ray.types import EvalReport, FloatArray, StepReport, Weights

__all__ = [
    "JOB_FILE",
    "METRICS_FILE",
    "WEIGHTS_FILE",
    "JobRecord",
    "Metrics",
    "MetricsWriter",
    "WeightsWriter",
    "flatten",
    "read_job",
    "read_metrics",
    "read_weights",
    "write_job",
]

METRICS_FILE = "metrics.csv"
TEXT_COLUMNS = frozenset({"bound_by"})

Row = dict[str, float | str]


def flatten(
    step_report: StepReport | None = None,
    weights: Weights | None = None,
    eval_reports: Mapping[str, EvalReport] | None = None,
) -> Row:
    """Public names for what one step did. Unknown values are left out, never written as zero.

    Evaluations are named by their file (`validation`, `retention`) and, broken down, by task:
    `retention.nll`, `retention.kl_nats`, `retention.sort.accuracy`.

    >>> flatten(weights=Weights(np.ones(2), gamma=0.0, beta=None, ess_ratio=1.0, bound_by="noise"))
    {'ess_ratio': 1.0, 'bound_by': 'noise', 'gamma': 0.0}
    """
    row: Row = {}
    if step_report is not None:
        row |= _flatten_step(step_report)
    if weights is not None:
        row |= {"ess_ratio": weights.ess_ratio, "bound_by": weights.bound_by}
        row |= _known(gamma=weights.gamma, beta=weights.beta)
        row |= {f"weights.{name}": float(value) for name, value in weights.metrics.items()}
    for name, report in (eval_reports or {}).items():
        row |= _flatten_evaluation(name, report)
    return row


def _flatten_step(report: StepReport) -> Row:
    row: Row = {
        "loss": report.loss,
        "nll": report.nll,
        "accuracy": report.accuracy,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "num_tokens": report.num_tokens,
    }
    total_s = report.seconds.get("total", sum(report.seconds.values()))
    if total_s > 0:
        row["tokens_per_s"] = report.num_tokens / total_s
    if report.num_positions > 0:
        row["padded_share"] = report.num_padded / report.num_positions
    row |= _known(grad_norm_clipped=report.grad_norm_clipped, kl_nats=report.kl_nats, entropy=report.entropy)
    row |= report.figures
    row |= {f"seconds_{part}": value for part, value in report.seconds.items()}
    return row


def _flatten_evaluation(name: str, report: EvalReport) -> Row:
    row: Row = {f"{name}.nll": report.nll, f"{name}.token_accuracy": report.token_accuracy}
    measured = {
        "accuracy": report.accuracy,
        "entropy": report.entropy,
        "kl_nats": report.kl_nats,
        "kl_reverse_nats": report.kl_reverse_nats,
    }
    row |= _known(**{f"{name}.{measure}": value for measure, value in measured.items()})
    for task, part in report.by_task.items():
        row |= _flatten_evaluation(f"{name}.{task}", part)
    return row


def _known(**values: float | None) -> Row:
    return {name: float(value) for name, value in values.items() if value is not None}


class MetricsWriter:
    """`metrics.csv`: one row per optimizer step, flushed as it is written.

    Step 0 is the state before training (evaluation only). Appending to a step again adds to its row:
    the figures of a step and those of the evaluation after it come one after the other. A column
    that was not there before rewrites the file once, under another name first.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS_FILE
        directory.mkdir(parents=True, exist_ok=True)
        self._columns, rows = _read_rows(self.path)
        self._last: Row = {}
        self._last_offset = 0
        self._rewrite(rows)

    def append(self, step: int, row: Mapping[str, float | str]) -> None:
        """Append the row of `step`, or complete it if it is the last one. Steps never go back."""
        last_step = int(self._last.get("step", -1))
        if step < last_step:
            raise StorageError(
                f"step {step} comes after step {last_step}.",
                file=str(self.path),
                mend="Call truncate_after with the checkpoint's step before writing again.",
            )
        merged: Row = {"step": step, **(self._last if step == last_step else {}), **row}
        new_columns = [name for name in merged if name not in self._columns]
        if new_columns:
            rows = _read_rows(self.path)[1]
            self._columns += new_columns
            self._rewrite([*(r for r in rows if int(r["step"]) != step), merged])
        else:
            self._replace_last(merged, step == last_step)

    def evaluated(self, step: int, row: Mapping[str, float | str]) -> None:
        """Add an evaluation to the row of `step`; before training that row is step 0's own."""
        self.append(step, row)

    def close(self) -> Path:
        """Nothing is held back: every row is in the file already."""
        return self.path

    def truncate_after(self, step: int) -> None:
        """Forget the rows after `step`: the job resumes from that checkpoint."""
        rows = _read_rows(self.path)[1]
        self._rewrite([r for r in rows if int(r["step"]) <= step])

    def _rewrite(self, rows: Sequence[Row]) -> None:
        lines = [_csv_line(self._columns)] + [self._line(row) for row in rows] if self._columns else []
        write_atomically(self.path, "".join(lines).encode())
        self._last = dict(rows[-1]) if rows else {}
        self._last_offset = self.path.stat().st_size - (len(lines[-1].encode()) if rows else 0)

    def _replace_last(self, row: Row, same_step: bool) -> None:
        with self.path.open("r+b") as file:
            offset = self._last_offset if same_step else file.seek(0, io.SEEK_END)
            file.seek(offset)
            file.write(self._line(row).encode())
            file.truncate()
        self._last, self._last_offset = row, offset

    def _line(self, row: Row) -> str:
        return _csv_line([_cell(row.get(name)) for name in self._columns])


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else repr(int(value) if isinstance(value, int) else float(value))


def _csv_line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows; an unfinished last line (the writer was killed) is left out."""
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [{name: _value(name, cell) for name, cell in row.items() if cell} for row in reader]
    return list(reader.fieldnames or []), rows


def _value(name: str, cell: str) -> float | str:
    if name in TEXT_COLUMNS:
        return cell
    return int(cell) if name in {"step", "num_tokens"} else float(cell)


@dataclass(frozen=True)
class Metrics:
    """`metrics.csv` by column. S = rows of the file, one per step.

    >>> m = Metrics.of([{"step": 0, "validation.nll": 2.0}, {"step": 1, "loss": 1.5}])
    >>> m.column("loss"), m.known("validation.nll")
    (array([nan, 1.5]), (array([0]), array([2.])))
    """

    step_S: NDArray[np.int64]
    columns: Mapping[str, FloatArray]
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float | str]]) -> Metrics:
        names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
        return cls(
            step_S=np.array([int(row["step"]) for row in rows], dtype=np.int64),
            columns={
                name: np.array([float(row.get(name, np.nan)) for row in rows])
                for name in names
                if name not in TEXT_COLUMNS
            },
            texts={
                name: tuple(str(row.get(name, "")) for row in rows) for name in names if name in TEXT_COLUMNS
            },
        )

    def __contains__(self, name: str) -> bool:
        return name in self.columns and bool(np.isfinite(self.columns[name]).any())

    def column(self, name: str) -> FloatArray:
        """Values of a column, NaN where the step has none (everywhere, if there is no such column)."""
        return self.columns.get(name, np.full(len(self.step_S), np.nan))

    def known(self, name: str) -> tuple[NDArray[np.int64], FloatArray]:
        """(steps, values) where the column has a finite value."""
        values_S = self.column(name)
        known_S = np.isfinite(values_S)
        return self.step_S[known_S], values_S[known_S]

    def first(self, name: str) -> float | None:
        values = self.known(name)[1]
        return float(values[0]) if len(values) else None

    def last(self, name: str) -> float | None:
        values = self.known(name)[1]
        return float(values[-1]) if len(values) else None

    def tasks(self, file: str = "retention", measure: str = "accuracy") -> tuple[str, ...]:
        """Tasks an evaluation file is broken down by, in the file's order."""
        prefix, suffix = f"{file}.", f".{measure}"
        inner = [name.removeprefix(prefix) for name in self.columns if name.startswith(prefix)]
        return tuple(name.removesuffix(suffix) for name in inner if name.endswith(suffix))


def read_metrics(directory: Path) -> Metrics:
    """Read `metrics.csv`; a directory without one has no rows yet."""
    return Metrics.of(_read_rows(directory / METRICS_FILE)[1])
