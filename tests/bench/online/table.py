"""The figures of all contenders beside each other."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


def speed_up(
    found: Mapping[str, Mapping[str, float]], name: str = "ours", unit: str = "samples_per_second"
) -> float:
    """Over the faster of TRL's two ways."""
    theirs = max(figures[unit] for who, figures in found.items() if who.startswith("trl"))
    return found[name][unit] / theirs


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    shown = Table(title="Online loop, end to end", title_justify="left")
    for heading in ("model", "contender"):
        shown.add_column(heading, no_wrap=True)
    columns = (
        "samples/s",
        "by CPU s",
        "tokens/s",
        "mean length",
        "cut",
        "waits",
        "sync / copy",
        "of which verify",
        "B/token",
    )
    for heading in columns:
        shown.add_column(heading, justify="right")
    for model, found in results.items():
        for name, figures in found.items():
            shown.add_row(model, name, *_cells(figures))
        shown.add_section()
    return shown


def _cells(figures: Mapping[str, float]) -> list[str]:
    copy = figures.get("copy_seconds")
    return [
        f"{figures['samples_per_second']:.2f}",
        f"{figures['samples_per_cpu_second']:.2f}" if "samples_per_cpu_second" in figures else "",
        f"{figures['tokens_per_second']:.0f}",
        f"{figures['mean_tokens']:.0f}",
        f"{figures['cut_share']:.0%}",
        f"{figures['wait_share']:.0%}" if "wait_share" in figures else "",
        f"{(figures['sync_seconds'] - figures['sync_drain_seconds']) / copy:.1f}" if copy else "",
        f"{figures['sync_verify_seconds'] / copy:.1f}" if copy else "",
        f"{figures['route_bytes_per_token']:.1f}" if "route_bytes_per_token" in figures else "",
    ]
