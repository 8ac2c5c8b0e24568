"""Rows of the one table of `make bench`: what was seen, beside what, and whether that was the aim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Table

HEADINGS = ("piece", "what", "ours", "beside", "ratio", "aim", "")


@dataclass(frozen=True)
class Line:
    """One figure. `ratio` is what the aim speaks of; without an aim the line is a report.

    >>> Line("rollout", "tokens/s over bare vLLM", "580", "600", 0.967, ">=", 0.95).reached
    True
    """

    piece: str
    what: str
    ours: str = ""
    beside: str = ""
    ratio: float | None = None
    relation: Literal[">=", "<="] | None = None
    bound: float | None = None

    @property
    def reached(self) -> bool | None:
        """None where there is no aim. Not a number is not reached."""
        if self.bound is None or self.ratio is None or self.relation is None:
            return None
        return bool(self.ratio >= self.bound if self.relation == ">=" else self.ratio <= self.bound)

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `HEADINGS`."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        aim = "" if self.bound is None else f"{'≥' if self.relation == '>=' else '≤'} {self.bound:g}"
        mark = {True: "reached", False: "not reached", None: ""}[self.reached]
        return (self.piece, self.what, self.ours, self.beside, ratio, aim, mark)


def slope(values: Mapping[float, float]) -> float:
    """Of log value over log size: 0 is not at all, 1 in proportion. NaN for fewer than two sizes.

    >>> round(slope({10: 1.0, 100: 10.0, 1000: 100.0}), 6)
    1.0
    """
    if len(values) < 2:
        return float("nan")
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def rich_table(lines: Sequence[Line], title: str) -> Table:
    """For a terminal; a rule between pieces."""
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("ratio", "aim") else "left")
    for previous, line in zip([None, *lines], lines, strict=False):
        if previous is not None and previous.piece != line.piece:
            table.add_section()
        *cells, mark = line.cells()
        colour = {"reached": "green", "not reached": "red"}.get(mark)
        table.add_row(*cells, f"[{colour}]{mark}[/]" if colour else mark)
    return table


def markdown(lines: Sequence[Line], heading: str, notes: Sequence[str]) -> str:
    """The same as a Markdown document."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(line.cells() for line in lines)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n\n".join([f"# {heading}", *notes, table]) + "\n"
