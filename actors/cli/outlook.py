"""What `modeseek check --score` shows: a line per weighting, then who would starve or dominate in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from actors.cli.format import BARS, number, share
from actors.commands.outlook import Look
from modeseek_ray.weights.outlook import BIN_EDGES, Outlook, RowWeight, Slice

ROWS_SHOWN = 5


def show_look(look: Look) -> RenderableType:
    """A table to compare by, and a paragraph for each weighting that tells rows apart."""
    parts: list[RenderableType] = [
        Text("Look before you train", style="bold"),
        Text(
            f"{look.num_rows:,} of {look.num_rows_file:,} rows scored under the start"
            f" (median loss {number(look.median_initial_nll)} nats per token), weighed as one batch.",
            style="dim",
        ),
        _table(look.outlooks),
    ]
    for note, names in _notes(look.outlooks).items():
        parts.append(Text.assemble((", ".join(names), "bold"), f": {note}"))
    for seen in look.outlooks:
        if seen.num_starved or seen.num_dominant or _told_apart(seen):
            parts += [Text(), Text(seen.name, style="bold"), Padding(_details(seen), (0, 0, 0, 2))]
    for each in look.impossible:
        error = each["error"]
        parts.append(
            Text.assemble((each["name"], "bold"), f": not possible: {error['message']} {error['mend']}")
        )
    return Group(*parts)


def _table(outlooks: Sequence[Outlook]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("weighting", no_wrap=True)
    for heading in ("ESS/n", "γ", "β"):
        table.add_column(heading, justify="right")
    table.add_column(f"weights\n2^{BIN_EDGES[0]:.0f}…2^{BIN_EDGES[-1]:.0f}", no_wrap=True)
    for heading in ("starved", "dominant", "corr.\nlength", "corr.\nloss"):
        table.add_column(heading, justify="right")
    for seen in outlooks:
        bound = f" {seen.bound_by}" if seen.bound_by not in ("none", "fixed") else ""
        table.add_row(
            escape(seen.name),
            number(seen.ess_ratio, 3),
            number(seen.gamma, 3) + bound,
            number(seen.beta, 3),
            bars([sum(seen.counts_B[i : i + 2]) for i in range(0, len(seen.counts_B), 2)]),
            f"{seen.num_starved:,}",
            f"{seen.num_dominant:,}",
            number(seen.corr_length, 2),
            number(seen.corr_initial_nll, 2),
        )
    return table


def bars(counts_B: Sequence[int]) -> str:
    """A histogram in one line; empty bins are dots, so that a single row still shows.

    >>> bars([0, 1, 8])
    '·▂█'
    """
    most = max(counts_B, default=0)
    return "".join("·" if count == 0 else BARS[round((len(BARS) - 1) * count / most)] for count in counts_B)


def _details(seen: Outlook) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    if seen.starved:
        grid.add_row(f"starved (< .1), {seen.num_starved:,} rows", _rows(seen.starved))
    if seen.dominant:
        grid.add_row(f"dominant (> 5), {seen.num_dominant:,} rows", _rows(seen.dominant))
    if len(seen.by_source) > 1:
        grid.add_row("mean weight by source", _slices(seen.by_source))
    if len(seen.by_length) > 1:
        grid.add_row("mean weight by length", _slices(seen.by_length))
    return grid


def _rows(rows: Sequence[RowWeight]) -> Text:
    return Text(", ".join(f"{row.row} ({row.weight:.2g})" for row in rows[:ROWS_SHOWN]))


def _slices(slices: Sequence[Slice]) -> Text:
    text = Text()
    for index, part in enumerate(slices):
        words = f"{part.label} {part.mean:.2f} ({share(part.weight_share)} of the weight)"
        text.append(f"{', ' if index else ''}{words}{' ' + part.verdict if part.verdict else ''}")
    return text


def _told_apart(seen: Outlook) -> bool:
    return sum(count > 0 for count in seen.counts_B) > 1


def _notes(outlooks: Sequence[Outlook]) -> Mapping[str, list[str]]:
    """Each note once, with the weightings it is about."""
    notes: dict[str, list[str]] = {}
    for seen in outlooks:
        for note in seen.notes:
            notes.setdefault(note, []).append(seen.name)
    return notes
