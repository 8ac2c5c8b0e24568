"""Numbers as people read them; shared by every view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from datetime import datetime

BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float | None) -> str:
    """
    >>> duration(7), duration(83), duration(3725), duration(None)
    ('7 s', '1:23', '1:02:05', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(num_bytes: float | None) -> str:
    """Decimal units, as disks and model cards count.

    >>> size(999), size(1_250_000), size(2.5e9)
    ('999 B', '1.2 MB', '2.5 GB')
    """
    if num_bytes is None:
        return "–"
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def number(value: float | str | None, digits: int = 4) -> str:
    """Significant digits, or a dash for what is not known.

    >>> number(0.123456), number(12345.678), number(None), number(1e-05, 2)
    ('0.1235', '12346', '–', '1e-05')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """
    >>> share(0.934), share(None)
    ('93.4 %', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def clock(unix_s: float | None) -> str:
    """Local date and time to the minute."""
    return "–" if unix_s is None else datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M")


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The course of a number in `width` characters, each the mean of its stretch; lowest to highest bar.

    >>> sparkline([4, 3, 2, 1, 0], width=5)
    '█▆▅▃▁'
    """
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] for m in means)
