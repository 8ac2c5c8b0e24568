"""What is kept of a job and how it is shown: metrics, the per-sample ledger, the HTML report.

The report draws with matplotlib, which is loaded when a report is asked for and not before: drivers
and the service import `results` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modeseek_ray.reports.summary import JobSummary, summarize

if TYPE_CHECKING:
    from modeseek_ray.reports.rows import Texts

__all__ = ["JobSummary", "summarize", "write_comparison", "write_report"]


def write_report(result_dir: Path, out: Path, texts: Texts | None = None) -> Path:
    """Write the HTML report of one job, finished or still running, and return its path.

    `texts` are the training rows' texts by row number, or the training file to look them up in.
    Raises `StorageError` if `result_dir` is not a job's.
    """
    from modeseek_ray.reports import html

    return html.write_report(result_dir, out, texts)


def write_comparison(result_dirs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page that compares several jobs, in the order given. Raises `StorageError`."""
    from modeseek_ray.reports import html

    return html.write_comparison(result_dirs, out)
