"""Matplotlib figures as inline SVG that follows the page: its fonts, its light and dark colours.

Figures are drawn in stand-in colours, which become CSS variables in the SVG text; text stays text.
The same data always gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from modeseek_ray.types import FloatArray

# Stand-ins no one draws by chance; templates/style.css defines the variables for light and dark.
INK, MUTED, GRID, PAPER, BAND = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = tuple(f"#0a0a{i:02x}" for i in range(1, 9))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", BAND: "band"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES, start=1)
}
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
LONGEST_LINE = 400  # points of a line; more are averaged

Curve = tuple[FloatArray, FloatArray]

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "modeseek",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


class Chart:
    """One small figure, drawn inside its `with` block; `svg` is there after it.

    The width suits a phone: wider pages put charts side by side instead of enlarging them.
    """

    def __init__(self, *, height_in: float = 2.7, width_in: float = 4.6, right_margin: float = 0.04) -> None:
        self._context = matplotlib.rc_context(_STYLE)
        self._size = (width_in, height_in)
        self._right_margin = right_margin
        self.svg = ""

    def __enter__(self) -> Chart:
        self._context.__enter__()
        self._figure = Figure(figsize=self._size)
        self.axes: Axes = self._figure.add_axes((0.115, 0.155, 0.885 - self._right_margin, 0.735))
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            buffer = io.StringIO()
            self._figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            self.svg = buffer.getvalue()
        self._context.__exit__(None, None, None)

    def legend(self, columns: int = 4, handles: Sequence[Artist] | None = None) -> None:
        """Above the plot, so that it hides nothing; of what is labelled, unless handles are given."""
        self.axes.legend(
            handles=handles if handles is not None else self.axes.get_legend_handles_labels()[0],
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.005),
            ncols=columns,
            borderaxespad=0,
            borderpad=0.1,
            handlelength=1.4,
            columnspacing=1.2,
            handletextpad=0.5,
        )

    def end_labels(self, ends: Sequence[tuple[float, float, str, str]]) -> None:
        """Names at the right ends of lines: (x, y, text, colour), moved apart where they would touch."""
        low, high = self.axes.get_ylim()
        wanted = [(y - low) / (high - low) for _, y, _, _ in ends]
        for (x, _, text, color), y in zip(ends, _apart(wanted, 0.082), strict=True):
            self.axes.annotate(
                text,
                (x, low + y * (high - low)),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=9,
                annotation_clip=False,
            )


def _apart(positions: Sequence[float], gap: float) -> list[float]:
    """The positions, pushed up and then back below 1 until neighbours are at least `gap` apart."""
    order = np.argsort(positions, kind="stable")
    placed = np.array(positions, dtype=float)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = 1.0
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    out = np.empty(len(placed))
    out[order] = placed
    return [float(y) for y in out]


def thin(steps_S: ArrayLike, values_S: ArrayLike, longest: int = LONGEST_LINE) -> Curve:
    """At most `longest` points: means over equal stretches of steps.

    >>> thin([1, 2, 3, 4], [0.0, 1.0, 5.0, 9.0], longest=2)
    (array([1.5, 3.5]), array([0.5, 7. ]))
    """
    steps = np.asarray(steps_S, dtype=np.float64)
    values = np.asarray(values_S, dtype=np.float64)
    if len(steps) <= longest:
        return steps, values
    starts = np.linspace(0, len(steps), longest, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def smooth(values_S: FloatArray, window: int) -> FloatArray:
    """Centred moving mean over `window` points, shorter at both ends.

    >>> smooth(np.array([0.0, 3.0, 6.0]), 3).tolist()
    [1.5, 3.0, 4.5]
    """
    kernel = np.ones(min(window, max(len(values_S), 1)))
    weight_S = np.convolve(np.ones(len(values_S)), kernel, mode="same")
    return np.convolve(values_S, kernel, mode="same") / weight_S


def inline(svg: str, *, name: str, label: str) -> str:
    """Matplotlib's document as part of a page: ids of its own, the page's colours and fonts, a label."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', body)
    content = body[body.index(">") + 1 : body.rindex("</svg>")]
    content = re.sub(r'(\bid=")', rf"\1{name}-", content)
    content = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", content)
    content = content.replace("xlink:href", "href")
    content = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", content)
    content = re.sub(r"#[0-9a-f]{6}", lambda m: _variable(m.group()), content)
    box = view_box.group(1) if view_box else "0 0 331 194"
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{escape(label, quote=True)}"'
        f' xmlns="http://www.w3.org/2000/svg">{content.strip()}</svg>'
    )


def _variable(color: str) -> str:
    return f"var(--{_VARIABLES[color]})" if color in _VARIABLES else color
