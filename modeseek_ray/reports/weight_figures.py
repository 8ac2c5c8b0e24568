"""The charts of how weights were spread over the samples."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator

from modeseek_ray.reports.chart import DASHES, MUTED, PAPER, SERIES, Chart, thin
from modeseek_ray.reports.distribution import BIN_EDGES, WeightCourse
from modeseek_ray.reports.figures import FigureView, figure, steps_axis

RIDGES = 6
BANDS_POINTS = 80  # a batch is small: neighbouring steps are averaged


def weight_bands(course: WeightCourse) -> FigureView | None:
    """Quantiles of the batch's weights at every step, on a logarithmic axis."""
    if len(course.step_S) == 0:
        return None
    log_SQ = np.log2(np.maximum(course.quantiles_SQ, 2.0 ** BIN_EDGES[0]))
    columns = [thin(course.step_S, log_S, longest=BANDS_POINTS) for log_S in log_SQ.T]
    steps = columns[0][0]
    low, lower, middle, upper, high = (values for _, values in columns)
    with Chart() as chart:
        chart.axes.fill_between(steps, low, high, color=SERIES[0], alpha=0.18, linewidth=0, label="5–95 %")
        chart.axes.fill_between(
            steps, lower, upper, color=SERIES[0], alpha=0.35, linewidth=0, label="25–75 %"
        )
        chart.axes.plot(steps, middle, color=SERIES[0], label="median")
        chart.axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=DASHES[2])
        weight_axis(chart.axes.yaxis)
        bottom, top = chart.axes.get_ylim()
        chart.axes.set_ylim(min(bottom, -1.2), max(top, 1.2))
        steps_axis(chart, int(course.step_S[-1]))
        chart.legend()
    caption = (
        "Weights within each batch; their mean is always 1 (dotted). A fan that opens means samples are told"
        " apart more and more."
    )
    return figure("bands", "Weights over time", caption, chart)


def weight_axis(axis: Axis) -> None:
    """An axis in log2 of the weight, labelled 1/4, 1, 4."""
    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda x, _: str(Fraction(2) ** round(x))))


def weight_ridges(course: WeightCourse) -> FigureView | None:
    """Histograms of the weights in equal stretches of the job, first on top."""
    if len(course.step_S) < RIDGES:
        return None
    centers_B = 0.5 * (BIN_EDGES[1:] + BIN_EDGES[:-1])
    stretches = np.array_split(np.arange(len(course.step_S)), RIDGES)
    shares = [course.counts_SB[part].sum(0) / course.counts_SB[part].sum() for part in stretches]
    top = max(float(s.max()) for s in shares[1:]) or 1.0
    with Chart() as chart:
        for index, (part, share_B) in enumerate(zip(stretches, shares, strict=True)):
            base = float(RIDGES - 1 - index)
            ridge_B = base + 1.7 * np.minimum(share_B / top, 1.0)
            chart.axes.fill_between(centers_B, base, ridge_B, color=PAPER, linewidth=0, zorder=2 * index)
            chart.axes.fill_between(
                centers_B, base, ridge_B, color=SERIES[0], alpha=0.3, linewidth=0, zorder=2 * index
            )
            chart.axes.plot(centers_B, ridge_B, color=SERIES[0], linewidth=1, zorder=2 * index + 1)
            first, last = course.step_S[part[0]], course.step_S[part[-1]]
            label = str(first) if first == last else f"{first}–{last}"
            chart.axes.text(BIN_EDGES[0], base + 0.12, label, color=MUTED, fontsize=8.5, zorder=40)
        chart.axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=DASHES[2], zorder=41)
        chart.axes.set_yticks([])
        chart.axes.grid(visible=False)
        weight_axis(chart.axes.xaxis)
        chart.axes.set_xlim(BIN_EDGES[0], BIN_EDGES[-1])
        chart.axes.set_xlabel("weight of a sample; the mean is 1", labelpad=2)
    caption = (
        "How the samples of six successive stretches of the job were weighted (steps at the left, first"
        " stretch on top)."
    )
    return figure("ridges", "Histogram of the weights", caption, chart)
