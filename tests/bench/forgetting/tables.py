"""The study's tables, in words: the headline of each piece, both architectures beside each other, the reduced set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.forgetting.analysis import (
    Fit,
    Interval,
    Line,
    Unit,
    at_target,
    headline,
    kl_fits,
    read_results,
    selected,
    units_of,
)
from tests.bench.forgetting.methods import baseline_of, methods_of
from tests.bench.forgetting.study import (
    PLANNED_TRIALS,
    Store,
    report_jobs,
    report_units,
    retention_of,
    select,
    source_of,
)

TITLES = {
    "standard": "Near, middle and far right answers",
    "long": "The same, trained twice as long",
    "rewards": "Sampled answers with rewards",
    "far": "Only far answers are right",
    "noisy": "A tenth of the labels is wrong",
    "lengths": "Strongly unequal lengths",
}
ARCHITECTURES = {"dense": "Dense models", "moe": "Mixtures of experts"}
HERE = Path(__file__).parent


def describe(setting: Mapping[str, Any]) -> str:
    """A selected trial in a few words: learning rate and own hyper-parameter."""
    words = [f"lr {setting['learning_rate']:g}"]
    weighting = setting["weighting"]
    gamma = weighting.get("likelihood", {}).get("gamma")
    if isinstance(gamma, dict):
        words.append(f"floor {gamma['ess']['floor']:g}")
    elif gamma is not None:
        words.append(f"γ {gamma:g}")
    if "kl" in weighting:
        words.append(f"coefficient {weighting['kl']['coefficient']:g}")
    named = {"token": ("gamma", "alpha", "threshold"), "reward": ("beta", "n", "share", "divide_by_std")}
    for section, names in named.items():
        words += [f"{n} {weighting[section][n]}" for n in names if n in weighting.get(section, {})]
    if "clip" in weighting.get("likelihood", {}):
        words.append(f"clip {weighting['likelihood']['clip'][1]:g}")
    own = {"lora_rank": "rank", "replay_prior": "prior", "flow_share": "γ × median"}
    words += [f"{word} {setting[name]:g}" for name, word in own.items() if setting[name] is not None]
    if setting["batches_at_once"] > 1:
        words.append(f"{32 * setting['batches_at_once']} rows at once")
    return ", ".join(words)


def cells(line: Line) -> list[str]:
    """One row of the headline table."""
    return [
        line.method,
        describe(line.setting),
        f"{line.reached} of {line.units}",
        "–" if line.retention is None else f"{100 * line.retention:.1f} %",
        _points(line.difference),
        _points(line.to_control),
        _where_both(line),
        _matched(line),
        _points(line.matched_control),
        "–" if line.text_nats is None else f"{line.text_nats:+.2f}",
        _equal_compute(line),
        line.verdict,
    ]


COLUMNS = (
    "method",
    "selected",
    "reached .9",
    "retention at .9",
    "minus baseline, points [95 %]",
    "minus shuffled control",
    "minus baseline where both reached .9",
    "minus baseline at matched success",
    "minus control at matched success",
    "text, nats",
    "retention at equal compute",
    "verdict",
)


def _points(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _where_both(line: Line) -> str:
    if line.both_reached is None:
        return "–"
    interval, units = line.both_reached
    return f"{_points(interval)} in {units}"


def _matched(line: Line) -> str:
    if line.matched is None or line.matched_success is None:
        return "–"
    return f"{_points(line.matched)} at {line.matched_success:.2f}"


def _equal_compute(line: Line) -> str:
    if line.at_equal_compute is None:
        return "not reached"
    part = (
        ""
        if line.reached_at_equal_compute == line.units
        else f" ({line.reached_at_equal_compute} of {line.units})"
    )
    return f"{100 * line.at_equal_compute:.1f} %{part}"


def coverage(runs: Sequence[Mapping[str, Any]], arch: str, variant: str, units: Sequence[Unit]) -> str:
    """Which units, how many trials, and what is missing."""
    source = source_of(variant)
    trials, common = selected(runs, arch, source)
    ran = {r["method"] for r in runs if r["variant"] == variant and not r["is_validation"]}
    missing = [name for name in methods_of(variant) if name not in trials or name not in ran]
    units_text = ", ".join(f"{base}.{data}" for base, data in units)
    text = (
        f"Report units (base.data): {units_text} of {len(report_units(arch))} planned;"
        f" {common} trials of each method of {PLANNED_TRIALS[arch]} planned."
    )
    return text + (f" Not run: {', '.join(missing)}." if missing else " All methods were run.")


def markdown(
    runs: Sequence[Mapping[str, Any]], arch: str, variant: str, units: Sequence[Unit], lines: Sequence[Line]
) -> str:
    """One piece's table with what is said above and below it."""
    rows = ["| " + " | ".join(cells(line)) + " |" for line in lines]
    fits = kl_fits(runs, arch, variant)
    return "\n".join(
        [
            f"### {TITLES[variant]} (`{variant}`, {arch})",
            "",
            coverage(runs, arch, variant, units) + f" Baseline: `{baseline_of(variant)}`.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *rows,
            "",
            kl_sentence(fits),
            "",
        ]
    )


def kl_sentence(fits: Mapping[str, Fit]) -> str:
    """H4: how far a line explains forgetting."""
    if not fits:
        return ""
    own = ", ".join(f"{n} {f.r_squared:.2f}" for n, f in fits.items() if n not in ("kl", "sqrt"))
    return (
        f"Forgetting against forward KL on new prompts, {fits['kl'].points} evaluations of all methods: R² "
        f"{fits['kl'].r_squared:.2f} in KL, {fits['sqrt'].r_squared:.2f} in its root; within methods (root): {own}."
    )


def beside(runs: Sequence[Mapping[str, Any]], variant: str = "standard") -> list[list[str]]:
    """A row a method: what it kept more than the baseline at matched success, dense and mixture, and whether both
    intervals say the same. Empty unless both were run."""
    of_arch = {}
    for arch in ARCHITECTURES:
        units = units_of(runs, arch, variant)
        of_arch[arch] = {line.method: line for line in headline(runs, arch, variant, units)} if units else {}
    dense, moe = of_arch["dense"], of_arch["moe"]
    found = []
    for name in methods_of(variant):
        if name in dense and name in moe and name != baseline_of(variant):
            reached = [f"{line[name].reached} of {line[name].units}" for line in (dense, moe)]
            says = _agreement(_side(dense[name].matched), _side(moe[name].matched))
            found.append([name, reached[0], _matched(dense[name]), reached[1], _matched(moe[name]), says])
    return found


BESIDE_COLUMNS = (
    "method",
    "dense: reached .9",
    "dense: minus baseline at matched success",
    "mixture: reached .9",
    "mixture: minus baseline at matched success",
    "both together",
)


def _side(interval: Interval | None) -> str | None:
    """Where all of the interval lies; None if there is none."""
    if interval is None:
        return None
    return "more" if interval.low > 0 else "less" if interval.high < 0 else "nothing shown"


def _agreement(dense: str | None, moe: str | None) -> str:
    if dense is None or moe is None:
        return "–"
    return f"both: {dense}" if dense == moe else f"dense {dense}, mixture {moe}"


def small_table(
    home: Path, arch: str, trials: int, methods: Sequence[str], selected_on: Unit, reported: Unit
) -> str:
    """Retention at success .9 of the reduced set's methods, beside what the full results say of them."""
    rows = Store(home / "bench-forgetting" / "runs.jsonl").rows()
    chosen = select(arch, "standard", rows, trials, methods, [selected_on])
    committed = HERE / "results.parquet"
    full: dict[str, Line] = {}
    if committed.exists():
        runs = read_results(committed)
        full = {x.method: x for x in headline(runs, arch, "standard", units_of(runs, arch, "standard"))}
    lines = [f"{'method':14}{'selected':28}{'retention at success .9':>25}{'full results':>14}"]
    for job in report_jobs(arch, "standard", chosen, [reported]):
        row = rows.get(job.key)
        if row is None:
            continue
        kept = at_target(row["path"], retention_of(row["path"]))
        here = "never reached" if kept is None else f"{100 * kept:.0f} %"
        there = full.get(job.method)
        known = "–" if there is None or there.retention is None else f"{100 * there.retention:.0f} %"
        lines.append(f"{job.method:14}{describe(row['setting']):28}{here:>25}{known:>14}")
    note = "One base, one data seed: the direction, not the size. PROTOCOL.md has the rest."
    return "\n".join([*lines, note])
