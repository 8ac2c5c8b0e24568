"""The page of results: tables, figures, one self-contained HTML file, and the reduced set's table."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from modeseek_ray.reports.html import render, write_page
from tests.bench.forgetting import drawing
from tests.bench.forgetting.analysis import (
    Fit,
    Interval,
    Line,
    Unit,
    headline,
    kl_fits,
    read_results,
    selected,
    units_of,
    write_results,
)
from tests.bench.forgetting.methods import baseline_of, methods_of
from tests.bench.forgetting.study import PLANNED_TRIALS, Store, report_jobs, report_units, select, source_of

TITLES = {
    "standard": "Near, middle and far right answers",
    "long": "The same, trained twice as long",
    "rewards": "Sampled answers with rewards",
    "far": "Only far answers are right",
    "noisy": "A tenth of the labels is wrong",
    "lengths": "Strongly unequal lengths",
}
HERE = Path(__file__).parent


def write(home: Path, out: Path, results: Path | None, *, arch: str, trials: int) -> list[Path]:
    """Results file, figures, HTML page and Markdown tables under `out`. From `results`, or the stored runs."""
    runs = load(home, results)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if results is None:
        write_results(runs, out / "results.parquet")
        written.append(out / "results.parquet")
    sections, markdown = [_about(runs)], [_about_text(runs)]
    for variant in TITLES:
        units = units_of(runs, arch, variant)
        if not units:
            markdown.append(f"## {TITLES[variant]} (`{variant}`)\n\nNot run, or not on one whole unit.\n")
            continue
        lines = headline(runs, arch, variant, units)
        figures = drawing.figures(runs, arch, variant, units, out)
        written += figures.values()
        sections.append(_section(runs, arch, variant, units, lines, figures))
        markdown.append(_markdown(runs, arch, variant, units, lines))
    page = render("base.html.jinja").replace("<title></title>", "<title>Forgetting · modeseek-ray</title>")
    page = page.replace("default-src 'none';", "default-src 'none'; img-src data:;")
    body = "<header><h1>Does weighting forget less?</h1></header><main>" + "".join(sections) + "</main>"
    written.append(write_page(out / "forgetting.html", page.replace("<body>\n", f"<body>\n{body}")))
    (out / "tables.md").write_text("\n".join(markdown), encoding="utf-8")
    return [*written, out / "tables.md"]


def load(home: Path, results: Path | None) -> list[dict[str, Any]]:
    """The runs of this code that are stored under `home`, or those of a results file."""
    if results is not None:
        return read_results(results)
    return list(Store(home / "bench-forgetting" / "runs.jsonl").rows().values())


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


def _about_text(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return "No run is stored.\n"
    cpu = ", ".join(sorted({_machine(run) for run in runs}))
    commits = ", ".join(sorted({r["commit"] for r in runs}))
    versions = "; ".join(sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in runs}))
    return f"{len(runs)} runs on {cpu}; commit {commits}; {versions}.\n"


def _machine(run: Mapping[str, Any]) -> str:
    where = "" if run["device"] == "cpu" else f"{run['device']}, beside "
    return f"{where}{run['cpu']}, {run['cores']} cores"


def _about(runs: Sequence[Mapping[str, Any]]) -> str:
    text = _about_text(runs) + (
        " The protocol (tests/bench/forgetting/PROTOCOL.md) was committed before any of them. Retention is old-task"
        " accuracy over what it was before; every method has had the same number of trials, chosen on a base"
        " that is not reported on."
    )
    return f"<p class='lead'>{escape(text)}</p>"


def _coverage(runs: Sequence[Mapping[str, Any]], arch: str, variant: str, units: Sequence[Unit]) -> str:
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


def _markdown(
    runs: Sequence[Mapping[str, Any]], arch: str, variant: str, units: Sequence[Unit], lines: Sequence[Line]
) -> str:
    rows = ["| " + " | ".join(cells(line)) + " |" for line in lines]
    fits = kl_fits(runs, arch, variant)
    return "\n".join(
        [
            f"## {TITLES[variant]} (`{variant}`, {arch})",
            "",
            _coverage(runs, arch, variant, units) + f" Baseline: `{baseline_of(variant)}`.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *rows,
            "",
            _kl_sentence(fits),
            "",
        ]
    )


def _kl_sentence(fits: Mapping[str, Fit]) -> str:
    if not fits:
        return ""
    own = ", ".join(f"{n} {f.r_squared:.2f}" for n, f in fits.items() if n not in ("kl", "sqrt"))
    return (
        f"Forgetting against forward KL on new prompts, {fits['kl'].points} evaluations of all methods: R² "
        f"{fits['kl'].r_squared:.2f} in KL, {fits['sqrt'].r_squared:.2f} in its root; within methods (root): {own}."
    )


def _section(
    runs: Sequence[Mapping[str, Any]],
    arch: str,
    variant: str,
    units: Sequence[Unit],
    lines: Sequence[Line],
    figures: Mapping[str, Path],
) -> str:
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells(line)) + "</tr>" for line in lines)
    pictures = "".join(
        f"<figure style='max-width:46rem'><img style='width:100%' alt='{escape(caption)}' src='{_data(figures[name])}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in drawing.CAPTIONS.items()
        if name in figures
    )
    return (
        f"<section><h2>{escape(TITLES[variant])}</h2><p>{escape(_coverage(runs, arch, variant, units))}</p>"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p>{escape(_kl_sentence(kl_fits(runs, arch, variant)))}</p><div class='figures'>{pictures}</div></section>"
    )


def _data(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def small_table(
    home: Path, arch: str, trials: int, methods: Sequence[str], selected_on: Unit, reported: Unit
) -> str:
    """Retention at success .9 of the reduced set's methods, beside what the full results say of them."""
    from tests.bench.forgetting.analysis import at_target
    from tests.bench.forgetting.study import retention_of

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
