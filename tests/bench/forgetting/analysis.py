"""From runs to the headline: selection, paired differences, intervals, equal compute, R².

A run is a dict as `study.Store` keeps it. U is the report units (base seed, data seed) of a piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeseek_ray.retention import retention_at_success
from tests.bench.forgetting.methods import baseline_of, methods_of
from tests.bench.forgetting.study import (
    TARGET,
    TRIALS,
    VALIDATION,
    retention_of,
    score_of,
    source_of,
    steps_of,
)

DRAWS = 10_000
LEAST_TRIALS = 5  # all five learning rates; a method that had fewer is not in the tables
Unit = tuple[int, int]
PER_RUN = "key arch variant method trial base_seed data_seed is_validation extra_cpu_s commit cpu cores device".split()


@dataclass(frozen=True)
class Interval:
    """A mean over units with its 95 % percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One method in the headline table."""

    method: str
    trial: int
    setting: Mapping[str, Any]
    reached: int  # units in which success .9 was reached
    units: int
    retention: float | None  # mean over the units that reached it
    text_nats: float | None  # rise of the text NLL there
    best_success: float  # mean over units of the path's best
    difference: Interval | None  # to the baseline, where both reached .9 in every unit
    to_control: Interval | None
    matched: Interval | None  # difference to the baseline where both first reach what both reach, .9 at most
    matched_success: float | None  # that success, mean over units
    matched_control: Interval | None  # the same against the shuffled control
    both_reached: (
        tuple[Interval, int] | None
    )  # difference at .9 over the units in which both reached it, and how many
    at_equal_compute: float | None  # retention, where .9 is reached within plain training's processor time
    reached_at_equal_compute: int
    verdict: str


def paths(
    runs: Iterable[Mapping[str, Any]], arch: str, variant: str, *, validation: bool
) -> list[Mapping[str, Any]]:
    """The runs of one piece and role."""
    return [r for r in runs if (r["arch"], r["variant"], r["is_validation"]) == (arch, variant, validation)]


def selected(runs: Sequence[Mapping[str, Any]], arch: str, variant: str) -> tuple[dict[str, int], int]:
    """The trial of each method chosen on the validation units, and how many trials each was chosen from."""
    tried: dict[str, dict[int, dict[Unit, Mapping[str, Any]]]] = {}
    for run in paths(runs, arch, variant, validation=True):
        of_trial = tried.setdefault(run["method"], {}).setdefault(run["trial"], {})
        of_trial[run["base_seed"], run["data_seed"]] = run
    had = {
        name: next(t for t in range(TRIALS + 1) if len(tried[name].get(t, {})) < len(VALIDATION))
        for name in methods_of(variant)
        if name in tried
    }
    known = [name for name, count in had.items() if count >= LEAST_TRIALS]
    if not known:
        return {}, 0
    common = min(had[name] for name in known)

    def score(name: str, trial: int) -> tuple[int, float]:
        return score_of([tried[name][trial][unit]["path"] for unit in VALIDATION])

    return {name: max(range(common), key=lambda t: score(name, t)) for name in known}, common


def hierarchical_bootstrap(by_unit: Mapping[Unit, float], *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean and 95 % interval: bases with replacement, in each its data seeds with replacement.

    >>> hierarchical_bootstrap({(1, 1): 0.25, (2, 1): 0.25})
    Interval(mean=0.25, low=0.25, high=0.25)
    """
    bases = sorted({base for base, _ in by_unit})
    values = [np.array([v for (b, _), v in sorted(by_unit.items()) if b == base]) for base in bases]
    rng = np.random.default_rng(seed)
    chosen_DB = rng.integers(len(bases), size=(draws, len(bases)))  # D draws, B bases
    means_DB = np.empty(chosen_DB.shape)
    for b, of_base in enumerate(values):
        is_b_DB = chosen_DB == b
        picks = rng.integers(len(of_base), size=(int(is_b_DB.sum()), len(of_base)))
        means_DB[is_b_DB] = of_base[picks].mean(1)
    low, high = np.percentile(means_DB.mean(1), [2.5, 97.5])
    mean = np.mean([v.mean() for v in values])
    return Interval(float(mean), float(low), float(high))


def at_target(path: Sequence[Mapping[str, Any]], values: Sequence[float]) -> float | None:
    """`values` where success first reaches the target, between evaluations linearly; None if it never does."""
    return retention_at_success([row["success"] for row in path], values, target=TARGET)


def seconds_per_step(runs: Iterable[Mapping[str, Any]], arch: str) -> dict[tuple[str, str], float]:
    """(device, method) -> median over its runs there of processor time per optimizer step, evaluations left out."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        last = run["path"][-1]
        if run["arch"] == arch and last["step"]:
            found.setdefault((run["device"], run["method"]), []).append(last["cpu_s"] / last["step"])
    return {key: float(np.median(values)) for key, values in found.items()}


def cost_in_baseline_steps(
    run: Mapping[str, Any], cost: Mapping[tuple[str, str], float], baseline: str
) -> tuple[float, float]:
    """What a step of this run cost, and what was trained before its first (`mode_seeking_data`'s checkpoint), both in
    steps of the baseline on the same device: seconds of a card's process and of a CPU are not the same."""
    unit = cost[run["device"], baseline]
    return cost[run["device"], run["method"]] / unit, run["extra_cpu_s"] / unit


def headline(runs: Sequence[Mapping[str, Any]], arch: str, variant: str, units: Sequence[Unit]) -> list[Line]:
    """A line for each method: winners first, then by retention, those that did not always reach .9 last."""
    source = source_of(variant)
    trials, _ = selected(runs, arch, source)
    cost = seconds_per_step(runs, arch)
    baseline = baseline_of(variant)
    by_method: dict[str, dict[Unit, Mapping[str, Any]]] = {}
    for run in paths(runs, arch, variant, validation=False):
        unit = (run["base_seed"], run["data_seed"])
        if unit in units and trials.get(run["method"]) == run["trial"]:
            by_method.setdefault(run["method"], {})[unit] = run
    kept = {
        name: {u: at_target(r["path"], retention_of(r["path"])) for u, r in of_unit.items()}
        for name, of_unit in by_method.items()
    }
    lines = []
    for name, of_unit in by_method.items():
        reached = {u: k for u, k in kept[name].items() if k is not None}
        text = [
            at_target(r["path"], [row["text_nll"] - r["path"][0]["text_nll"] for row in r["path"]])
            for r in of_unit.values()
        ]
        within = [
            _within(r, *cost_in_baseline_steps(r, cost, baseline), steps_of(variant))
            for r in of_unit.values()
        ]
        known_text = [t for t in text if t is not None]
        known_within = [w for w in within if w is not None]
        control = methods_of(variant)[name].control
        difference = _paired(kept[name], kept.get(baseline, {}), units) if name != baseline else None
        to_control = _paired(kept[name], kept.get(control, {}), units) if control else None
        matched = _matched(of_unit, by_method.get(baseline, {}), units) if name != baseline else None
        against_control = _matched(of_unit, by_method.get(control, {}), units) if control else None
        all_reached = len(reached) == len(units)
        lines.append(
            Line(
                method=name,
                trial=trials[name],
                setting=next(iter(of_unit.values()))["setting"],
                reached=len(reached),
                units=len(of_unit),
                retention=float(np.mean(list(reached.values()))) if reached else None,
                text_nats=float(np.mean(known_text)) if known_text else None,
                best_success=float(np.mean([max(p["success"] for p in r["path"]) for r in of_unit.values()])),
                difference=difference,
                to_control=to_control,
                matched=None if matched is None else matched[0],
                matched_success=None if matched is None else matched[1],
                matched_control=None if against_control is None else against_control[0],
                both_reached=_where_both_reached(kept[name], kept.get(baseline, {})) if matched else None,
                at_equal_compute=float(np.mean(known_within)) if known_within else None,
                reached_at_equal_compute=len(known_within),
                verdict=_verdict(name, baseline, all_reached, difference, to_control, control),
            )
        )
    return sorted(lines, key=lambda x: (x.reached == x.units, x.reached, x.retention or 0.0), reverse=True)


def _paired(
    mine: Mapping[Unit, float | None], other: Mapping[Unit, float | None], units: Sequence[Unit]
) -> Interval | None:
    """Of the differences by unit; None unless both reached the target in every unit."""
    differences = {}
    for unit in units:
        a, b = mine.get(unit), other.get(unit)
        if a is None or b is None:
            return None
        differences[unit] = a - b
    return hierarchical_bootstrap(differences) if differences else None


def _where_both_reached(
    mine: Mapping[Unit, float | None], other: Mapping[Unit, float | None]
) -> tuple[Interval, int] | None:
    """Told beside the headline, never instead of it: units that a method failed are missing here."""
    both = [u for u in mine if mine[u] is not None and other.get(u) is not None]
    interval = _paired(mine, other, both)
    return None if interval is None else (interval, len(both))


def _matched(
    mine: Mapping[Unit, Mapping[str, Any]], other: Mapping[Unit, Mapping[str, Any]], units: Sequence[Unit]
) -> tuple[Interval, float] | None:
    """Paired differences of retention at the success that both reach, and the mean of it over units."""
    differences, common = {}, []
    for unit in units:
        if unit not in mine or unit not in other:
            return None
        kept = []
        success = [[row["success"] for row in runs[unit]["path"]] for runs in (mine, other)]
        target = min(TARGET, *(max(s) for s in success))
        for runs, reached in zip((mine, other), success, strict=True):
            kept.append(retention_at_success(reached, retention_of(runs[unit]["path"]), target=target))
        if kept[0] is None or kept[1] is None:
            return None
        differences[unit] = kept[0] - kept[1]
        common.append(target)
    return (hierarchical_bootstrap(differences), float(np.mean(common))) if differences else None


def _within(run: Mapping[str, Any], per_step: float, before: float, budget: float) -> float | None:
    """Retention at the target if it is reached before the compute is used up, all in steps of the baseline."""
    affordable = (budget - before) / per_step
    path = [row for row in run["path"] if row["step"] <= affordable + 1e-9]
    return at_target(path, retention_of(run["path"])[: len(path)]) if path else None


def _verdict(
    name: str,
    baseline: str,
    all_reached: bool,
    difference: Interval | None,
    to_control: Interval | None,
    control: str | None,
) -> str:
    if name == baseline:
        return "baseline"
    if not all_reached:
        return "did not always reach .9"
    if difference is None:
        return f"{baseline} did not always reach .9"
    if difference.high < 0:
        return "loses"
    if difference.low <= 0:
        return "no difference shown"
    if name.startswith("shuffled_"):
        return "a control, above the baseline"
    if control and (to_control is None or to_control.low <= 0):
        return "above, but not above its shuffled control"
    return "wins"


@dataclass(frozen=True)
class Fit:
    """Forgetting = intercept + slope x, least squares."""

    slope: float
    intercept: float
    r_squared: float
    points: int


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """A straight line.

    >>> fit([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]).r_squared
    1.0
    """
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - slope * np.asarray(x) - intercept
    total = np.asarray(y) - np.mean(y)
    share = 1 - float((residual**2).sum() / (total**2).sum())
    return Fit(float(slope), float(intercept), share, len(x))


def kl_fits(runs: Sequence[Mapping[str, Any]], arch: str, variant: str) -> dict[str, Fit]:
    """Forgetting against forward KL on new prompts over all evaluations of report runs: `kl`, `sqrt`, and
    `sqrt` within each method."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in paths(runs, arch, variant, validation=False):
        for row, kept in zip(run["path"], retention_of(run["path"]), strict=True):
            points.setdefault(run["method"], []).append((max(row["new_kl_nats"], 0.0), 1 - kept))
    all_points = np.array([p for of_method in points.values() for p in of_method])
    if len(all_points) < 3:
        return {}
    found = {
        "kl": fit(all_points[:, 0], all_points[:, 1]),
        "sqrt": fit(np.sqrt(all_points[:, 0]), all_points[:, 1]),
    }
    for name, of_method in points.items():
        array = np.array(of_method)
        found[name] = fit(np.sqrt(array[:, 0]), array[:, 1])
    return found


def units_of(runs: Sequence[Mapping[str, Any]], arch: str, variant: str) -> list[Unit]:
    """Report units in which every method was run that was run in any: whole comparisons alone are reported."""
    source = source_of(variant)
    trials, _ = selected(runs, arch, source)
    seen: dict[Unit, set[str]] = {}
    for run in paths(runs, arch, variant, validation=False):
        if trials.get(run["method"]) == run["trial"]:
            seen.setdefault((run["base_seed"], run["data_seed"]), set()).add(run["method"])
    every = set().union(*seen.values()) if seen else set()
    return sorted(unit for unit, names in seen.items() if names == every)


def write_results(runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One row an evaluation, small: what `read_results` makes runs of again."""
    rows = [
        {
            **{name: run[name] for name in PER_RUN},
            "setting": json.dumps(run["setting"], sort_keys=True),
            "versions": json.dumps(run["versions"], sort_keys=True),
            **{k: (round(v, 5) if isinstance(v, float) else v) for k, v in row.items()},
        }
        for run in runs
        for row in run["path"]
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, compression="zstd")


def read_results(file: Path) -> list[dict[str, Any]]:
    """Runs, as they were stored."""
    found: dict[str, dict[str, Any]] = {}
    for row in pq.read_table(file).to_pylist():
        identity = {name: row.pop(name) for name in PER_RUN}
        setting, versions = json.loads(row.pop("setting")), json.loads(row.pop("versions"))
        run = found.setdefault(
            identity["key"], {**identity, "setting": setting, "versions": versions, "path": []}
        )
        run["path"].append(row)
    return list(found.values())
