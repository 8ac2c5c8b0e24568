"""The charts of a report, each with the sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from modeseek_ray.reports.chart import (
    BAND,
    DASHES,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    Chart,
    inline,
    smooth,
    thin,
)
from modeseek_ray.reports.results import Metrics

HEALTHY_ESS = (0.2, 0.5)  # METHODS.md section 7: healthy range when gamma is fixed
BOUND_COLORS = {
    "ess": SERIES[0],
    "cap": SERIES[1],
    "warmup": SERIES[3],
    "noise": SERIES[4],
    "fixed": SERIES[2],
}
BOUND_MEANINGS = {
    "ess": "the ESS floor",
    "cap": "its maximum",
    "warmup": "the warm-up",
    "noise": "the noise floor",
    "fixed": "fixed",
}


@dataclass(frozen=True)
class FigureView:
    """What the template shows: title, SVG, caption."""

    title: str
    svg: str
    caption: str


def figure(name: str, title: str, caption: str, chart: Chart) -> FigureView:
    """`name` is unique within the page; readers who do not see the chart get title and caption."""
    return FigureView(title, inline(chart.svg, name=name, label=f"{title}. {caption}"), caption)


def steps_axis(chart: Chart, last_step: int) -> None:
    chart.axes.set_xlim(0, max(last_step, 1))
    chart.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    chart.axes.set_xlabel("optimizer step", labelpad=2)


def _percent(chart: Chart, lowest: float = 0.0) -> None:
    """Shares: from 0, or from the tenth below the lowest of them where all are high."""
    bottom = max(0.0, np.floor(10 * lowest - 1) / 10)
    chart.axes.set_ylim(bottom - 0.02 * (1 - bottom), 1 + 0.04 * (1 - bottom))
    chart.axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    chart.axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def loss(metrics: Metrics) -> FigureView | None:
    """Weighted and unweighted training loss, and the validation loss."""
    if "loss" not in metrics:
        return None
    with Chart() as chart:
        for name, label, color in (("nll", "unweighted", SERIES[0]), ("loss", "weighted", SERIES[1])):
            steps, values = metrics.known(name)
            if not len(values):
                continue
            window = max(1, len(values) // 30)
            chart.axes.plot(*thin(steps, values), color=color, linewidth=0.7, alpha=0.3)
            chart.axes.plot(*thin(steps, smooth(values, window)), color=color, label=label)
        steps, values = metrics.known("validation.nll")
        if len(values):
            chart.axes.plot(
                steps, values, "o-", color=SERIES[2], markersize=3.5, label="validation", clip_on=False
            )
        steps_axis(chart, int(metrics.step_S[-1]))
        chart.axes.set_ylim(bottom=0 if chart.axes.get_ylim()[0] >= 0 else None)
        chart.legend()
    caption = (
        "Nats per trained token. The weighted loss is what was minimised; the unweighted one counts every"
        " token alike and is the one to compare between jobs. Faint: every step; bold: a moving mean."
    )
    return figure("loss", "Loss", caption, chart)


def ess(metrics: Metrics) -> FigureView | None:
    """Effective sample size with its healthy band."""
    if "ess_ratio" not in metrics:
        return None
    steps, values = metrics.known("ess_ratio")
    with Chart() as chart:
        chart.axes.axhspan(*HEALTHY_ESS, color=BAND, linewidth=0)
        middle = 0.5 * sum(HEALTHY_ESS)
        style: dict[str, Any] = {"va": "center", "color": MUTED, "fontsize": 8.5}
        chart.axes.text(0.01, middle, "healthy", transform=chart.axes.get_yaxis_transform(), **style)
        chart.axes.plot(*thin(steps, values), color=SERIES[0], linewidth=0.8, alpha=0.45)
        chart.axes.plot(*thin(steps, smooth(values, max(1, len(values) // 30))), color=SERIES[0])
        steps_axis(chart, int(metrics.step_S[-1]))
        chart.axes.set_ylim(0, 1.03)
    caption = (
        "ESS/n: the share of the batch that effectively counts. 1 is plain fine-tuning; below 0.1 too few"
        " samples learn, above 0.8 the weighting hardly does anything."
    )
    return figure("ess", "Effective sample size", caption, chart)


def exponent(metrics: Metrics, name: str) -> FigureView | None:
    """Gamma over time and what bound it; beta likewise, without the latter."""
    if name not in metrics:
        return None
    steps, values = metrics.known(name)
    bounds = [
        b
        for b, known in zip(
            metrics.texts.get("bound_by", ()), np.isfinite(metrics.column(name)), strict=False
        )
        if known
    ]
    with Chart() as chart:
        if name == "gamma":
            _shade_bounds(chart, steps, bounds)
        chart.axes.plot(*thin(steps, values), color=INK, linewidth=1.4)
        steps_axis(chart, int(metrics.step_S[-1]))
        chart.axes.set_ylim(0, max(1e-3, 1.08 * float(values.max())))
        if name == "gamma" and set(bounds) & set(BOUND_MEANINGS):
            handles = [
                Patch(facecolor=BOUND_COLORS[b], alpha=0.3, linewidth=0, label=BOUND_MEANINGS[b])
                for b in BOUND_MEANINGS
                if b in bounds
            ]
            chart.legend(handles=handles)
    if name == "gamma":
        caption = (
            "γ, how sharply likelihood decides the weights (0 = not at all). The shading says what held it"
            " back at each step."
        )
        return figure("gamma", "γ and what bound it", caption, chart)
    caption = "β, the reward scale: weights go with exp(reward / β), so a smaller β listens to rewards more."
    return figure("beta", "β", caption, chart)


def _shade_bounds(chart: Chart, steps: np.ndarray, bounds: Sequence[str]) -> None:
    """One shaded span for each run of steps with the same constraint."""
    if not bounds:
        return
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(bounds)) if a != b), len(bounds)]
    for start, end in pairwise(starts):
        color = BOUND_COLORS.get(bounds[start])
        if color is not None:
            chart.axes.axvspan(steps[start] - 1, steps[end - 1], color=color, alpha=0.22, linewidth=0)


def retention(metrics: Metrics) -> FigureView | None:
    """Accuracy over time of every old task that was ever solved, labelled at the right end."""
    names = {f"retention.{task}.accuracy": task for task in metrics.tasks("retention")}
    names = {name: task for name, task in names.items() if metrics.known(name)[1].any()}
    if not names:
        names = {name: "old tasks" for name in ("retention.accuracy",) if name in metrics}
    if not names:
        return None
    with Chart(right_margin=0.19, height_in=3.0) as chart:
        ends = []
        for index, (name, task) in enumerate(names.items()):
            steps, values = metrics.known(name)
            color = SERIES[index % len(SERIES)]
            dashes = DASHES[index // len(SERIES) % len(DASHES)]
            chart.axes.plot(
                steps, values, marker="o", markersize=3, color=color, linestyle=dashes, clip_on=False
            )
            ends.append((float(steps[-1]), float(values[-1]), task, color))
        steps_axis(chart, int(metrics.step_S[-1]))
        _percent(chart, min(float(metrics.known(name)[1].min()) for name in names))
        chart.end_labels(ends)
    caption = (
        "Greedy accuracy on each old task, none of which is trained on. A line that falls is forgetting."
    )
    return figure("retention", "Old tasks while the new one is learnt", caption, chart)


def kl(metrics: Metrics) -> FigureView | None:
    """KL to the start on both held-out files, in both directions."""
    lines = [
        ("retention.kl_nats", "old tasks, KL(π₀‖π)", SERIES[3], "-"),
        ("retention.kl_reverse_nats", "old tasks, KL(π‖π₀)", SERIES[3], "--"),
        ("validation.kl_nats", "new task, KL(π₀‖π)", SERIES[2], "-"),
        ("validation.kl_reverse_nats", "new task, KL(π‖π₀)", SERIES[2], "--"),
    ]
    caption = (
        "Nats per token, the whole vocabulary summed: how far the model has moved on the new task, and on the"
        " old ones, where it should have stayed. KL(π₀‖π) is large where something the start would have said is"
        " lost, KL(π‖π₀) where something is said that the start would not have."
    )
    return _lines(metrics, lines, name="kl", title="Distance from the start", caption=caption, few=True)


def entropy(metrics: Metrics) -> FigureView | None:
    """The policy's entropy on the batch and on the held-out files."""
    lines = [
        ("entropy", "training batch", SERIES[0], "-"),
        ("validation.entropy", "new task", SERIES[2], "-"),
        ("retention.entropy", "old tasks", SERIES[3], "-"),
    ]
    caption = (
        "Mean entropy of the next-token distribution over trained tokens, in nats. One that falls towards zero"
        " is a policy that has become sure of itself."
    )
    return _lines(metrics, lines, name="entropy", title="Entropy of the policy", caption=caption)


def parameter_distance(metrics: Metrics) -> FigureView | None:
    """Norm of theta - theta_0."""
    caption = (
        "‖θ − θ₀‖ over all trained parameters; with LoRA of the merged weights. How far the parameters have"
        " moved, whatever that did to the answers."
    )
    lines = [("parameter_distance", "", SERIES[4], "-")]
    return _lines(
        metrics, lines, name="distance", title="Distance of the parameters", caption=caption, few=True
    )


def gradient_norm(metrics: Metrics) -> FigureView | None:
    """Global gradient norm before and after clipping."""
    lines = [
        ("grad_norm", "before clipping", SERIES[5], "-"),
        ("grad_norm_clipped", "after", SERIES[0], "-"),
    ]
    caption = (
        "Global gradient norm; the optimizer gets the one after clipping. Spikes are batches the model found"
        " surprising."
    )
    return _lines(metrics, lines, name="gradients", title="Gradient norm", caption=caption)


def _lines(
    metrics: Metrics,
    lines: Sequence[tuple[str, str, str, str]],
    *,
    name: str,
    title: str,
    caption: str,
    few: bool = False,
) -> FigureView | None:
    """Some columns over the steps, each (column, label, colour, dashes); `few` marks every point."""
    lines = [line for line in lines if line[0] in metrics]
    if not lines:
        return None
    with Chart() as chart:
        for column, label, color, dashes in lines:
            steps, values = metrics.known(column)
            marks: dict[str, Any] = {"marker": "o", "markersize": 3.5, "clip_on": False} if few else {}
            chart.axes.plot(
                *thin(steps, values), color=color, linestyle=dashes, linewidth=1.1, label=label, **marks
            )
        steps_axis(chart, int(metrics.step_S[-1]))
        chart.axes.set_ylim(bottom=0)
        if len(lines) > 1:
            chart.legend(columns=2)
    return figure(name, title, caption, chart)


def paths(jobs: Mapping[str, Metrics]) -> FigureView | None:
    """Retention against new-task success through training, one line a job: the figure that decides."""
    drawn = {
        name: path for name, metrics in jobs.items() if len((path := success_and_retention(metrics))[0]) > 0
    }
    if not drawn:
        return None
    with Chart(height_in=3.4) as chart:
        for index, (name, (success, kept)) in enumerate(drawn.items()):
            color, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            chart.axes.plot(success, kept, color=color, linestyle=DASHES[index % len(DASHES)], alpha=0.75)
            chart.axes.scatter(success[1:-1], kept[1:-1], s=12, color=color, marker=marker, linewidths=0)
            chart.axes.scatter(success[:1], kept[:1], s=38, facecolor=PAPER, edgecolor=MUTED, zorder=4)
            chart.axes.scatter(
                success[-1:], kept[-1:], s=52, color=color, marker=marker, linewidths=0, zorder=5, label=name
            )
        low = min(float(kept.min()) for _, kept in drawn.values())
        chart.axes.set_xlim(-0.02, 1.02)
        chart.axes.set_ylim(max(-0.02, low - 0.08), 1.02)
        for axis in (chart.axes.xaxis, chart.axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        chart.axes.set_xlabel("new task solved", labelpad=2)
        chart.axes.set_title("old tasks solved", loc="left", color=MUTED, pad=22 if len(drawn) > 1 else 8)
        if len(drawn) > 1:
            chart.legend(columns=3)
    caption = (
        "The path through training from the start (hollow) to the end (large). Right is more learnt, up is"
        " more kept; the best job ends nearest to the upper right corner."
    )
    return figure("paths", "Kept against learnt", caption, chart)


def success_and_retention(metrics: Metrics) -> tuple[np.ndarray, np.ndarray]:
    """New-task and old-task accuracy at the evaluations that have both."""
    success_S, kept_S = metrics.column("validation.accuracy"), metrics.column("retention.accuracy")
    both_S = np.isfinite(success_S) & np.isfinite(kept_S)
    return success_S[both_S], kept_S[both_S]


def compare(
    jobs: Mapping[str, Metrics],
    column: str,
    *,
    name: str,
    title: str,
    caption: str,
    percent: bool = False,
    decorate: Callable[[Chart], None] | None = None,
) -> FigureView | None:
    """One column of several jobs over the steps."""
    shown = {job: metrics for job, metrics in jobs.items() if column in metrics}
    if not shown:
        return None
    with Chart() as chart:
        if decorate is not None:
            decorate(chart)
        for index, (job, metrics) in enumerate(jobs.items()):
            if job not in shown:
                continue
            steps, values = metrics.known(column)
            few = len(steps) <= 60
            values = values if few else smooth(values, max(1, len(values) // 30))
            chart.axes.plot(
                *thin(steps, values),
                color=SERIES[index % len(SERIES)],
                linestyle=DASHES[index % len(DASHES)],
                marker=MARKERS[index % len(MARKERS)] if few else None,
                markersize=3.5,
                clip_on=not few,
                label=job,
            )
        steps_axis(chart, max(int(m.step_S[-1]) for m in shown.values()))
        if percent:
            _percent(chart, min(float(m.known(column)[1].min()) for m in shown.values()))
        else:
            chart.axes.set_ylim(bottom=0)
        chart.legend(columns=3)
    return figure(name, title, caption, chart)


def healthy_band(chart: Chart) -> None:
    chart.axes.axhspan(*HEALTHY_ESS, color=BAND, linewidth=0)
