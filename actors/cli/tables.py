"""Jobs, checkpoints and results as tables. Takes the service's objects as plain dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from actors.cli.format import clock, duration, number, share
from modeseek_ray.reports.summary import JobSummary
from modeseek_ray.retention import TaskChange

STATUS_STYLES = {
    "succeeded": "green",
    "running": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
}
CHECKPOINT_METRICS = (
    ("train loss", ("train_loss",)),
    ("valid loss", ("valid_loss", "validation.nll")),
    ("ESS/n", ("ess_ratio",)),
    ("old tasks", ("retention.accuracy",)),
    ("KL, nats", ("retention.kl_nats",)),
)


def job_list(jobs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a job, newest first as the service lists them."""
    if not jobs:
        return Text("No jobs yet. Submit one with: modeseek submit job.yaml", style="dim")
    table = _table("job", "name", "status", "method", "step", "created")
    table.columns[0].min_width = max(len(job["id"]) for job in jobs)  # whole on one line: it is copied
    for job in jobs:
        table.add_row(
            escape(job["id"]),
            escape(job.get("suffix") or (job.get("metadata") or {}).get("name") or "–"),
            _status(job["status"]),
            escape((job.get("method") or {}).get("type", "supervised")),
            _steps(job.get("progress") or {}),
            clock(job.get("created_at")),
        )
    return table


def job_details(job: Mapping[str, Any]) -> RenderableType:
    """Everything about one job: state, speed, results, error and how to mend it, method."""
    progress = job.get("progress") or {}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("job", escape(job["id"])),
        ("status", _status(job["status"])),
        ("model", escape(str(job.get("model", "")))),
        ("fine-tuned model", escape(job.get("fine_tuned_model") or "–")),
        ("created", clock(job.get("created_at"))),
        ("finished", clock(job.get("finished_at"))),
        ("attempt", str(job.get("attempt", 1))),
        ("step", _steps(progress)),
    ]
    if progress.get("tokens_per_s"):
        rows.append(
            ("speed", f"{progress['tokens_per_s']:.0f} tokens/s, ETA {duration(progress.get('eta_s'))}")
        )
    if job.get("trained_tokens") is not None:
        rows.append(("trained tokens", f"{job['trained_tokens']:,}"))
    roles = [role for role in ("training", "validation", "retention", "replay") if job.get(f"{role}_file")]
    rows += [(f"{role} file", escape(str(job[f"{role}_file"]))) for role in roles]
    if job.get("result_files"):
        rows.append(("result files", escape(", ".join(map(str, job["result_files"])))))
    error = job.get("error") or {}
    if error.get("message"):
        rows.append(("error", Text(f"{error.get('code')}: {error['message']}", style="red")))
    for label, value in rows:
        grid.add_row(label, value)
    method = json.dumps(job.get("method") or {}, indent=2, ensure_ascii=False)
    return Group(grid, Text(""), Syntax(method, "json", background_color="default"))


def checkpoint_list(checkpoints: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a checkpoint with the figures that decide which one to take."""
    if not checkpoints:
        return Text("No checkpoints yet.", style="dim")
    known = {name for checkpoint in checkpoints for name in checkpoint.get("metrics") or {}}
    shown = [(label, names) for label, names in CHECKPOINT_METRICS if known.intersection(names)]
    table = _table("checkpoint", "step", *(label for label, _ in shown), "created")
    for checkpoint in checkpoints:
        metrics = checkpoint.get("metrics") or {}
        table.add_row(
            escape(checkpoint.get("fine_tuned_model_checkpoint") or checkpoint["id"]),
            str(checkpoint.get("step_number", "–")),
            *(number(_first_of(metrics, names)) for _, names in shown),
            clock(checkpoint.get("created_at")),
        )
    return table


def comparison(summaries: Sequence[JobSummary]) -> RenderableType:
    """The demo's table: what was learnt, what was kept, at what price; one column a job."""
    table = Table(box=box.SIMPLE_HEAD, title="New task learnt, old tasks kept", title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(escape(summary.name), justify="right")
    table.add_row("new task", *(_change(s.new_task) for s in summaries), end_section=True)
    tasks = list(dict.fromkeys(c.task for s in summaries for c in s.old_tasks))
    for task in tasks:
        changes = [next((c for c in s.old_tasks if c.task == task), None) for s in summaries]
        table.add_row(f"old: {escape(task)}", *(_change(c) for c in changes))
    table.add_row("old, all together", *(_change(s.retention) for s in summaries), end_section=True)
    table.add_row("KL to the start, nats/token", *(number(s.kl_nats, 3) for s in summaries))
    table.add_row("ESS/n, median", *(number(s.ess_ratio, 3) for s in summaries))
    table.add_row("γ, median", *(number(s.gamma, 3) for s in summaries))
    table.add_row("steps", *(str(s.num_steps) for s in summaries))
    table.add_row("trained tokens", *(f"{s.num_tokens:,}" for s in summaries))
    table.add_row("time", *(duration(s.seconds) for s in summaries))
    return table


def _change(change: TaskChange | None) -> Text:
    if change is None:
        return Text("–")
    shown = share if change.measure == "accuracy" else number
    better = change.change > 0 if change.measure == "accuracy" else change.change < 0
    style = "" if change.change == 0 else "green" if better else "red"
    return Text.assemble((f"{shown(change.before)} → ", "dim"), (shown(change.after), style))


def _steps(progress: Mapping[str, Any]) -> str:
    if progress.get("step") is None:
        return "–"
    total = progress.get("total_steps")
    return f"{progress['step']}/{total}" if total else str(progress["step"])


def _status(status: str) -> Text:
    return Text(status, style=STATUS_STYLES.get(status, ""))


def _first_of(metrics: Mapping[str, Any], names: Sequence[str]) -> float | None:
    return next((metrics[name] for name in names if metrics.get(name) is not None), None)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
