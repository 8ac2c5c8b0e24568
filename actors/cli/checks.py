"""What `modeseek check` shows: the data, with line numbers of what is wrong, and the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from actors.cli.format import BARS, number, share, size
from modeseek_ray.jobs import memory
from modeseek_ray.jobs.memory import Part
from modeseek_ray.jobs.plan import Plan, Processes

PROBLEMS_SHOWN = 12


def show_data(report: Mapping[str, Any]) -> RenderableType:
    """`DataReport.to_dict()`: figures of each file, then problems with file and line, then warnings."""
    files: Mapping[str, Mapping[str, Any]] = report["files"]
    parts: list[RenderableType] = [_file_table(files)]
    problems = [problem for file in files.values() for problem in file["problems"]]
    total = sum(sum(file["problem_counts"].values()) for file in files.values())
    if problems:
        parts.append(Text(f"{total} problem{'' if total == 1 else 's'}", style="bold red"))
        parts += [_problem(problem) for problem in problems[:PROBLEMS_SHOWN]]
        kinds = sorted({kind for file in files.values() for kind in file["problem_counts"]})
        if total > PROBLEMS_SHOWN:
            parts.append(Text(f"… and {total - PROBLEMS_SHOWN} more ({', '.join(kinds)})", style="dim"))
    parts += [Text(f"warning: {warning['message']}", style="yellow") for warning in report["warnings"]]
    return Group(*parts)


def _file_table(files: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Data", title_justify="left", title_style="bold")
    table.add_column("")
    for role in files:
        table.add_column(escape(role), justify="right", overflow="fold")
    rows: list[tuple[str, list[str]]] = [
        ("file", [escape(f["file"]) for f in files.values()]),
        ("rows", [f"{f['rows']:,}" for f in files.values()]),
        ("tokens", [f"{f['tokens']:,}" for f in files.values()]),
        ("trained tokens", [f"{f['trained_tokens']:,}" for f in files.values()]),
        ("longest sample", [f"{f['longest']:,}" for f in files.values()]),
        ("lengths", [histogram_bars(f["length_histogram"]) for f in files.values()]),
        ("padding, estimated", [share(f["padding_share"]) for f in files.values()]),
        ("tasks", [escape(", ".join(f["tasks"])) or "–" for f in files.values()]),
        ("graded rows", [f"{f['graded_rows']:,}" for f in files.values()]),
        ("with reward", [f"{f['rows_with_reward']:,}" for f in files.values()]),
    ]
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def histogram_bars(histogram: Mapping[str, int]) -> str:
    """Counts by upper bound as bars between the smallest and the largest bound.

    >>> histogram_bars({"8": 1, "16": 8, "64": 4})
    '8 ▂█▁▅ 64'
    """
    counts = {int(bound): count for bound, count in histogram.items()}
    if not counts:
        return "–"
    low, high, most = min(counts), max(counts), max(counts.values())
    bounds = [low]
    while bounds[-1] < high:
        bounds.append(2 * bounds[-1])
    bars = [BARS[round((len(BARS) - 1) * counts.get(bound, 0) / most)] for bound in bounds]
    return f"{low} {''.join(bars)} {high}"


def _problem(problem: Mapping[str, Any]) -> RenderableType:
    place = problem["file"] if problem["line"] is None else f"{problem['file']}:{problem['line']}"
    text = Text.assemble((place, "bold"), f": {problem['message']} ", (problem["mend"], "dim"))
    return Padding(text, (0, 0, 0, 2))


def show_plan(plan: Plan, *, in_full: bool = False) -> RenderableType:
    """Steps, processes and their memory, disk; `in_full` also how these are estimated, and on what assumptions."""
    parts: list[RenderableType] = [Text("Plan", style="bold"), _facts(plan), _process_table(plan.processes)]
    parts += [Text(sentence, style="dim") for sentence in plan.picked]
    if not in_full:
        parts.append(Text("Memory and disk are estimates; --plan says how they are made.", style="dim"))
        return Group(*parts)
    parts.append(Text(f"Memory and disk are estimates ({memory.SYMBOLS}):", style="dim"))
    parts.append(Padding(_formulas(plan.processes), (0, 0, 0, 2)))
    parts += [Padding(Text(f"· {text}", style="dim"), (0, 0, 0, 2)) for text in plan.assumptions]
    return Group(*parts)


def _facts(plan: Plan) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    trainable = plan.num_trainable / max(1, plan.num_parameters)
    grid.add_row(
        "model", f"{escape(plan.model)}, {plan.num_parameters:,} parameters, {share(trainable)} trained"
    )
    if plan.training is not None:
        training = plan.training
        grid.add_row(
            "steps",
            f"{training.total_steps:,} of {training.batch_size} samples, {_times(training.epochs)},"
            f" learning rate {number(training.learning_rate)}",
        )
        grid.add_row(
            "checks on the way",
            f"evaluation every {training.evaluate_every} steps, checkpoint every {training.checkpoint_every}",
        )
    if plan.tokens is not None:
        grid.add_row("trained tokens", f"{plan.tokens:,}")
    gpus = f", {number(plan.gpus)} GPUs" if plan.gpus else ""
    cpus = f"{number(plan.cpus)} CPU{'' if plan.cpus == 1 else 's'}"
    grid.add_row("cluster", f"{cpus}{gpus}, {size(plan.host_bytes)} of memory at the busiest time")
    disk = ", ".join(f"{part.name} {size(part.num_bytes)}" for part in plan.disk)
    grid.add_row("disk", f"{size(plan.disk_bytes)}: {disk}")
    return grid


def _times(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _process_table(processes: Sequence[Processes]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("processes", "when", "CPUs", "GPUs", "memory each", "of it"):
        table.add_column(column, overflow="fold")
    for p in processes:
        table.add_row(
            f"{p.count} × {p.role}",
            p.phase,
            number(p.cpus_each),
            number(p.gpus_each),
            size(p.host_bytes) + (f" + GPU {size(p.device_bytes)}" if p.device else ""),
            _breakdown((*p.host, *p.device)),
        )
    return table


def _breakdown(parts: Sequence[Part]) -> str:
    """Largest first."""
    ordered = sorted(parts, key=lambda part: -part.num_bytes)
    return ", ".join(f"{part.name} {size(part.num_bytes)}" for part in ordered)


def _formulas(processes: Sequence[Processes]) -> Table:
    """Each formula once for each kind of process it holds for."""
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(style="dim", overflow="fold")
    for p in processes:
        for part in (*p.host, *p.device):
            grid.add_row(p.role, part.name, part.formula)
    return grid
