"""The page of `modeseek check --score --html`: what each weighting would do to the rows, before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeseek_ray.reports.chart import MUTED, SERIES, Chart
from modeseek_ray.reports.figures import FigureView, figure
from modeseek_ray.reports.html import render, write_page
from modeseek_ray.reports.rows import Texts, find_texts
from modeseek_ray.reports.weight_figures import weight_axis
from modeseek_ray.weights.outlook import BIN_EDGES, Outlook, Slice


def write_outlook(
    outlooks: Sequence[Outlook],
    out: Path,
    *,
    title: str,
    lead: str,
    impossible: Sequence[Mapping[str, Any]] = (),
    texts: Texts | None = None,
) -> Path:
    """Write one self-contained page and return its path. `texts` is the training file, or texts by row."""
    rows = [row.row for seen in outlooks for row in (*seen.starved, *seen.dominant)]
    page = render(
        "outlook.html.jinja",
        title=title,
        lead=lead,
        outlooks=outlooks,
        figures={seen.name: _figures(index, seen) for index, seen in enumerate(outlooks)},
        impossible=impossible,
        texts=find_texts(texts, rows),
    )
    return write_page(out, page)


def _figures(index: int, seen: Outlook) -> list[FigureView]:
    views = [histogram(seen, f"weights-{index}")]
    if len(seen.by_source) > 1:
        views.append(slices(seen.by_source, f"sources-{index}", "Mean weight by source"))
    if len(seen.by_length) > 1:
        views.append(slices(seen.by_length, f"lengths-{index}", "Mean weight by length in tokens"))
    return views


def histogram(seen: Outlook, name: str) -> FigureView:
    """Rows by weight, bins equal in its logarithm."""
    with Chart() as chart:
        chart.axes.bar(
            BIN_EDGES[:-1],
            seen.counts_B,
            width=np.diff(BIN_EDGES),
            align="edge",
            color=SERIES[0],
            linewidth=0,
        )
        chart.axes.axvline(0, color=MUTED, linewidth=0.8)
        weight_axis(chart.axes.xaxis)
        chart.axes.set_xlim(BIN_EDGES[0], BIN_EDGES[-1])
        chart.axes.set_xlabel("weight over the mean", labelpad=2)
    caption = (
        f"ESS/n {seen.ess_ratio:.2f}: {seen.num_starved:,} of {seen.num_rows:,} rows would starve (below 1/10)"
        f" and {seen.num_dominant:,} dominate (above 5). The end bins hold what is beyond them."
    )
    return figure(name, "Rows by weight", caption, chart)


def slices(parts: Sequence[Slice], name: str, title: str) -> FigureView:
    """Mean weight of the rows of each label; the average row is at 1."""
    height_in = max(1.6, 0.9 + 0.24 * len(parts))
    with Chart(height_in=height_in) as chart:
        positions = np.arange(len(parts))[::-1]
        chart.axes.barh(positions, [part.mean for part in parts], color=SERIES[0], height=0.6)
        for position, part in zip(positions, parts, strict=True):
            label = f" {part.label} ({part.num_rows:,})"
            chart.axes.text(part.mean, position, label, va="center", fontsize=8.5)
        chart.axes.axvline(1, color=MUTED, linewidth=0.8)
        chart.axes.set_yticks([])
        chart.axes.set_xlim(0, 1.6 * max(1.0, *(part.mean for part in parts)))
    caption = "Mean weight; in brackets the number of rows. The line at 1 is the average row."
    return figure(name, title, caption, chart)
