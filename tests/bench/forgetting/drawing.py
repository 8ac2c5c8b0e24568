"""The figures of the results page, as SVG: fronts, forgetting against KL, ESS and gamma, equal compute.

Lines and few points stay vectors and text stays text; the thousand points of `kl` are one picture inside.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tests.bench.forgetting.analysis import (
    Line,
    Unit,
    at_target,
    cost_in_baseline_steps,
    fit,
    paths,
    seconds_per_step,
    selected,
)
from tests.bench.forgetting.methods import baseline_of, methods_of
from tests.bench.forgetting.study import FOLLOWING, TARGET, retention_of, source_of

CAPTIONS = {
    "fronts": "Old tasks kept against the new one learnt, along the path of each method's selected trial: mean over"
    " report units at each success, band from the lowest to the highest unit. Further up is less forgotten.",
    "headline": "Retention when success .9 is first reached: dots are report units, bars their mean. Hollow with a"
    " cross: not reached in every unit.",
    "kl": "Forgetting against the forward KL to the start on new prompts, every evaluation of every report run.",
    "control": "γ and ESS/n along training, mean over report units, of the methods that have a γ.",
    "compute": "Success and retention against what training cost, in steps of the baseline on the same device.",
}
COLORS = (
    "#1f63b0 #c8571b #2b7f4f #7d4fa8 #12808c #b03060 #8a6d1a #5d6773 #4a90d9 #e08a4f #57a978 #a47fc7"
    " #56b4bf #d36b93 #b89b4a #8a8f98 #333333 #000000"
).split()
GRID = np.linspace(0.1, 1.0, 37)
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "forgetting"}
SHOWN_FIRST = (
    "sft",
    "mode_seeking",
    "anchored",
    "flow",
    "dft",
    "sft_kl_forward",
    "replay",
    "shuffled_anchored",
)


def figures(
    runs: Sequence[Mapping[str, Any]],
    arch: str,
    variant: str,
    units: Sequence[Unit],
    lines: Sequence[Line],
    out: Path,
) -> dict[str, Path]:
    """Draw what is shown of this piece, as SVG files; by name. `lines` are its headline's."""
    chosen = _chosen(runs, arch, variant, units)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(methods_of(variant))}
    with matplotlib.rc_context(_STYLE):
        drawn = {
            "fronts": _fronts(chosen, colors),
            "headline": _headline(lines, chosen, colors),
        }
        if (
            variant not in FOLLOWING
        ):  # of the others the page has the fit's figures, and the costs are the same
            drawn |= {
                "kl": _kl(chosen, colors),
                "control": _control(chosen, colors),
                "compute": _compute(chosen, colors, seconds_per_step(runs, arch), baseline_of(variant)),
            }
        files = {}
        for name, figure in drawn.items():
            if figure is not None:
                files[name] = out / f"{variant}-{arch}-{name}.svg"
                files[name].write_text(_svg(figure), encoding="utf-8")
    return files


def _svg(figure: Figure) -> str:
    """The same figure always gives the same bytes; coordinates to a hundredth of a point."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=100, metadata={"Date": None, "Creator": None})
    return re.sub(r"(\d\.\d\d)\d+", r"\1", buffer.getvalue())


def _chosen(
    runs: Sequence[Mapping[str, Any]], arch: str, variant: str, units: Sequence[Unit]
) -> dict[str, list[Mapping[str, Any]]]:
    """Report runs of the selected trials, by method."""
    source = source_of(variant)
    trials, _ = selected(runs, arch, source)
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in paths(runs, arch, variant, validation=False):
        if trials.get(run["method"]) == run["trial"] and (run["base_seed"], run["data_seed"]) in units:
            found.setdefault(run["method"], []).append(run)
    return {name: found[name] for name in methods_of(variant) if name in found}


def _axes(width: float = 8.0, height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#dfe3e8", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _front(run: Mapping[str, Any]) -> np.ndarray:
    """Retention where each success of GRID is first reached; NaN beyond the path's best."""
    from modeseek_ray.retention import retention_at_success

    success = [row["success"] for row in run["path"]]
    kept = retention_of(run["path"])
    values = [retention_at_success(success, kept, target=float(t)) for t in GRID]
    return np.array([np.nan if v is None else v for v in values])


def _fronts(chosen: Mapping[str, Sequence[Mapping[str, Any]]], colors: Mapping[str, str]) -> Figure:
    figure, axes = _axes()
    for name, of_method in chosen.items():
        fronts = np.array([_front(run) for run in of_method])
        known = ~np.isnan(fronts).any(0)
        main = name in SHOWN_FIRST or len(chosen) <= 8
        style = {"linewidth": 2.2 if main else 1.0, "linestyle": ":" if name.startswith("shuffled") else "-"}
        axes.plot(GRID[known], fronts.mean(0)[known], color=colors[name], label=name, **style)
        if main:
            band = (fronts.min(0)[known], fronts.max(0)[known])
            axes.fill_between(GRID[known], *band, color=colors[name], alpha=0.10, linewidth=0)
    axes.axvline(TARGET, color="#5d6773", linewidth=0.8)
    axes.set(xlabel="new task solved", ylabel="old tasks kept", xlim=(0.1, 1.0), ylim=(0, 1.03))
    _percent(axes)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _headline(
    lines: Sequence[Line],
    chosen: Mapping[str, Sequence[Mapping[str, Any]]],
    colors: Mapping[str, str],
) -> Figure:
    figure, axes = _axes(height=0.9 + 0.3 * len(lines))
    for y, line in enumerate(lines[::-1]):
        kept = [at_target(run["path"], retention_of(run["path"])) for run in chosen[line.method]]
        known = [k for k in kept if k is not None]
        color = colors[line.method]
        if line.reached == line.units:
            axes.barh(y, np.mean(known), color=color, alpha=0.35, height=0.6)
            axes.plot(known, [y] * len(known), "o", color=color, markersize=4)
        else:
            axes.plot(known, [y] * len(known), "o", color=color, markersize=4, markerfacecolor="none")
            axes.plot(0.01, y, "x", color=color)
            axes.text(0.03, y, f"reached .9 in {line.reached} of {line.units}", va="center", fontsize=8)
    axes.set_yticks(range(len(lines)), [line.method for line in lines[::-1]], fontsize=9)
    axes.set(xlim=(0, 1), xlabel="old tasks kept when 90 % of the new one is solved")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def _kl(chosen: Mapping[str, Sequence[Mapping[str, Any]]], colors: Mapping[str, str]) -> Figure | None:
    figure, axes = _axes()
    x: list[float] = []
    y: list[float] = []
    for name, of_method in chosen.items():
        mine = [
            (np.sqrt(max(row["new_kl_nats"], 0.0)), 1 - kept)
            for run in of_method
            for row, kept in zip(run["path"], retention_of(run["path"]), strict=True)
        ]
        axes.plot(
            *zip(*mine, strict=True),
            "o",
            color=colors[name],
            markersize=3,
            alpha=0.6,
            label=name,
            rasterized=True,
        )
        x += [float(a) for a, _ in mine]
        y += [float(b) for _, b in mine]
    if len(x) < 3:
        return None
    line = fit(x, y)
    ends = np.array([0.0, max(x)])
    axes.plot(ends, line.intercept + line.slope * ends, color="#191d22", linewidth=1)
    axes.set(
        xlabel="root of forward KL(π₀‖π) on new prompts, √(nats per token)",
        ylabel="forgotten (1 − retention)",
        title=f"R² {line.r_squared:.2f} over {line.points} evaluations",
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _control(chosen: Mapping[str, Sequence[Mapping[str, Any]]], colors: Mapping[str, str]) -> Figure | None:
    with_gamma = {n: r for n, r in chosen.items() if any(p.get("gamma") is not None for p in r[0]["path"])}
    if not with_gamma:
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for position, (column, label) in enumerate((("gamma", "γ"), ("ess_ratio", "ESS/n"))):
        axes = figure.add_subplot(1, 2, position + 1)
        axes.grid(True, color="#dfe3e8", linewidth=0.8)
        for name, of_method in with_gamma.items():
            rows = [[p for p in run["path"] if p.get(column) is not None] for run in of_method]
            steps = [p["step"] for p in rows[0]]
            values = np.mean([[p[column] for p in of_run] for of_run in rows], axis=0)
            axes.plot(steps, values, color=colors[name], label=name)
        axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, None))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _compute(
    chosen: Mapping[str, Sequence[Mapping[str, Any]]],
    colors: Mapping[str, str],
    cost: Mapping[tuple[str, str], float],
    baseline: str,
) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for position, label in enumerate(("new task solved", "old tasks kept")):
        axes = figure.add_subplot(1, 2, position + 1)
        axes.grid(True, color="#dfe3e8", linewidth=0.8)
        for name, of_method in chosen.items():
            of_runs = [cost_in_baseline_steps(run, cost, baseline) for run in of_method]
            per_step, before = np.mean(of_runs, axis=0)
            spent = before + per_step * np.array([row["step"] for row in of_method[0]["path"]])
            values = [
                [row["success"] for row in run["path"]] if position == 0 else retention_of(run["path"])
                for run in of_method
            ]
            axes.plot(spent, np.mean(values, axis=0), color=colors[name], linewidth=1.2, label=name)
        axes.set(xlabel=f"training alone, in steps of {baseline}", ylabel=label, ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _percent(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
