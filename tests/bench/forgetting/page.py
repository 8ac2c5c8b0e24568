"""The page of results: tables and figures of both architectures in one self-contained HTML file, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from modeseek_ray.reports.chart import inline
from modeseek_ray.reports.html import render, write_page
from tests.bench.forgetting import drawing
from tests.bench.forgetting.analysis import (
    Line,
    Unit,
    headline,
    kl_fits,
    read_results,
    units_of,
    write_results,
)
from tests.bench.forgetting.study import Store
from tests.bench.forgetting.tables import (
    ARCHITECTURES,
    BESIDE_COLUMNS,
    COLUMNS,
    TITLES,
    beside,
    cells,
    coverage,
    kl_sentence,
    markdown,
)


def write(home: Path, out: Path, results: Path | None) -> list[Path]:
    """Results file, figures, HTML page and Markdown tables under `out`. From `results`, or the stored runs."""
    runs = load(home, results)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if results is None:
        write_results(runs, out / "results.parquet")
        written.append(out / "results.parquet")
        # Rounded there: whoever reads the file again gets these tables.
        runs = read_results(out / "results.parquet")
    sections, texts = [_about(runs)], [_about_text(runs)]
    for arch, title in ARCHITECTURES.items():
        sections.append(f"<h2>{escape(title)}</h2>")
        texts.append(f"## {title}\n")
        for variant in TITLES:
            units = units_of(runs, arch, variant)
            if not units:
                continue
            lines = headline(runs, arch, variant, units)
            figures = drawing.figures(runs, arch, variant, units, lines, out)
            written += figures.values()
            sections.append(_section(runs, arch, variant, units, lines, figures))
            texts.append(markdown(runs, arch, variant, units, lines))
        sections.append(f"<p>{escape(_not_run(runs, arch))}</p>")
        texts.append(_not_run(runs, arch) + "\n")
    sections.append(_beside_section(runs))
    texts.append(_beside_text(runs))
    page = render("base.html.jinja").replace("<title></title>", "<title>Forgetting · modeseek-ray</title>")
    page = page.replace("default-src 'none';", "default-src 'none'; img-src data:;")  # `kl`'s points
    body = "<header><h1>Does weighting forget less?</h1></header><main>" + "".join(sections) + "</main>"
    written.append(write_page(out / "forgetting.html", page.replace("<body>\n", f"<body>\n{body}")))
    (out / "tables.md").write_text("\n".join(text for text in texts if text), encoding="utf-8")
    return [*written, out / "tables.md"]


def load(home: Path, results: Path | None) -> list[dict[str, Any]]:
    """The runs of this code that are stored under `home`, or those of a results file."""
    if results is not None:
        return read_results(results)
    return list(Store(home / "bench-forgetting" / "runs.jsonl").rows().values())


def _not_run(runs: Sequence[Mapping[str, Any]], arch: str) -> str:
    """Said of pieces without one whole unit, so that none goes missing in silence."""
    missing = [f"`{variant}`" for variant in TITLES if not units_of(runs, arch, variant)]
    return f"Not run, or not on one whole unit: {', '.join(missing)}." if missing else "All pieces were run."


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


def _section(
    runs: Sequence[Mapping[str, Any]],
    arch: str,
    variant: str,
    units: Sequence[Unit],
    lines: Sequence[Line],
    figures: Mapping[str, Path],
) -> str:
    pictures = "".join(
        "<figure style='max-width:46rem'>"
        + inline(figures[name].read_text(encoding="utf-8"), name=f"{variant}-{arch}-{name}", label=caption)
        + f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in drawing.CAPTIONS.items()
        if name in figures
    )
    return (
        f"<section><h3>{escape(TITLES[variant])} ({variant})</h3><p>{escape(coverage(runs, arch, variant, units))}</p>"
        f"<div class='scroll'>{_table(COLUMNS, [cells(line) for line in lines])}</div>"
        f"<p>{escape(kl_sentence(kl_fits(runs, arch, variant)))}</p><div class='figures'>{pictures}</div></section>"
    )


def _beside_text(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = beside(runs)
    if not rows:
        return ""
    table = [BESIDE_COLUMNS, ["---"] * len(BESIDE_COLUMNS), *rows]
    return "## Both beside each other (`standard`)\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)


def _beside_section(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = beside(runs)
    table = f"<div class='scroll'>{_table(BESIDE_COLUMNS, rows)}</div>"
    return f"<section><h2>Both beside each other (standard)</h2>{table}</section>" if rows else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
