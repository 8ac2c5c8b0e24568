"""What `modeseek check --plan` shows: time by part, memory of the fullest device, the best division of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from actors.cli.format import duration, size
from modeseek_ray.jobs.scale import Scale, Split, TimePart


def show_scale(found: Scale) -> RenderableType:
    """Tables of a `Scale`, and under them everything it takes for granted."""
    parts: list[RenderableType] = [
        Text(f"Time on {found.hardware.name}", style="bold"),
        _facts(found),
        _parts(found.step, found.step_s),
    ]
    if found.splits:
        parts += [
            Text("GPUs for trainers and for engines, fastest first", style="bold"),
            _splits(found.splits),
        ]
    parts.append(Text("Times are estimates:", style="dim"))
    parts += [Padding(Text(f"· {text}", style="dim"), (0, 0, 0, 2)) for text in found.assumptions]
    return Group(*parts)


def _facts(found: Scale) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    speed = "" if found.tokens_per_s is None else f", {found.tokens_per_s:,.0f} trained tokens/s"
    grid.add_row("step", f"{duration_of(found.step_s)}{speed}")
    for part in found.once:
        grid.add_row(part.name, f"{duration_of(part.seconds)}, once")
    if found.job_s is not None:
        grid.add_row("job", f"{duration_of(found.job_s)} without evaluations and checkpoints")
    room = size(round(found.hardware.memory_bytes))
    verdict = "fits" if found.fits else "DOES NOT FIT"
    grid.add_row("memory", f"{size(found.device_bytes)} in the fullest of {room}: {verdict}")
    return grid


def duration_of(seconds: float) -> str:
    """Below a minute with the digits that small models need."""
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"


def _parts(parts: Sequence[TimePart], total: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part of a step")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    table.add_column("from", overflow="fold", style="dim")
    for part in sorted(parts, key=lambda part: -part.seconds):
        table.add_row(part.name, duration_of(part.seconds), f"{part.seconds / total:.0%}", part.formula)
    return table


def _splits(splits: Sequence[Split]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("trainers", "engines", "round", "training", "writing"):
        table.add_column(name, justify="right")
    table.add_column("")
    for split in splits:
        table.add_row(
            str(split.trainers),
            str(split.generators),
            duration_of(split.round_s),
            duration_of(split.train_s),
            duration_of(split.generate_s),
            split.why_not or "fits",
            style=None if split.fits else "dim",
        )
    return table
