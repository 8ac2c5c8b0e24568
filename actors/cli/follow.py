"""A job as it runs: a live panel on a terminal, one line per event anywhere else.

Both are fed with the same event objects (`type` `message` or `metrics`, `message`, `level`, `data`),
whether they come from the service's stream or from a journal in this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actors.cli.format import duration, number, share, sparkline

Event = Mapping[str, Any]
LEVEL_STYLES = {"warn": "yellow", "error": "bold red"}
KEPT_MESSAGES = 6
SPARKLINE_WIDTH = 16  # the panel fits 80 columns


@dataclass
class Progress:
    """What the events seen so far add up to. Seeing an event twice changes nothing but the history."""

    title: str = ""
    step: int = 0
    total_steps: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)  # for changes against the start of the job
    losses: dict[int, float] = field(default_factory=dict)  # by step
    messages: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=KEPT_MESSAGES))

    def update(self, event: Event) -> None:
        data = event.get("data") or {}
        if event.get("type") == "metrics":
            self._figures(data)
        elif event.get("message"):
            self.messages.append((event.get("level", "info"), str(event["message"])))

    def _figures(self, data: Mapping[str, Any]) -> None:
        self.step = max(self.step, int(data.get("step", 0)))
        self.total_steps = data.get("total_steps", self.total_steps)
        self.tokens_per_s = data.get("tokens_per_s", self.tokens_per_s)
        self.eta_s = data.get("eta_s", self.eta_s)
        self.latest |= data
        self.first = {**data, **self.first}
        if "loss" in data and "step" in data:
            self.losses[int(data["step"])] = float(data["loss"])


class Follower:
    """Shows events as they come. Use as a context manager; `show` may be called from a callback.

    With `live=None` the console decides: a panel that redraws itself on a terminal, lines elsewhere.
    """

    def __init__(self, console: Console | None = None, *, title: str = "", live: bool | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(title=title)
        wanted = self.console.is_terminal if live is None else live
        self._live = (
            Live(panel(self.progress), console=self.console, refresh_per_second=4) if wanted else None
        )

    def __enter__(self) -> Follower:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        self.progress.update(event)
        if self._live:
            self._live.update(panel(self.progress))
        elif line := plain_line(event):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def follow(
    events: Iterable[Event], console: Console | None = None, *, title: str = "", live: bool | None = None
) -> Progress:
    """Show events until there are no more; what they added up to is returned."""
    with Follower(console, title=title, live=live) as follower:
        for event in events:
            follower.show(event)
    return follower.progress


def plain_line(event: Event) -> str | None:
    """One event as one line, None where there is nothing to say.

    >>> plain_line({"type": "metrics", "data": {"step": 3, "total_steps": 9, "loss": 1.5, "ess_ratio": 0.4,
    ...             "gamma": 0.25, "bound_by": "ess", "tokens_per_s": 812.0, "eta_s": 83}})
    'step 3/9  loss 1.5  ESS/n 0.4  γ 0.25 (ess)  812 tokens/s  ETA 1:23'
    """
    data = event.get("data") or {}
    if event.get("type") != "metrics":
        level = event.get("level", "info")
        prefix = {"warn": "warning: ", "error": "error: "}.get(level, "")
        return f"{prefix}{event['message']}" if event.get("message") else None
    total = f"/{data['total_steps']}" if data.get("total_steps") else ""
    parts = [f"step {data.get('step', 0)}{total}"]
    parts += [f"{label} {number(data[key])}" for label, key in PLAIN_FIGURES if key in data]
    if data.get("gamma") is not None:
        parts.append(_gamma(data))
    parts += [f"{label} {share(data[key])}" for label, key in PLAIN_SHARES if key in data]
    if "retention.kl_nats" in data:
        parts.append(f"KL {number(data['retention.kl_nats'])} nats")
    if "tokens_per_s" in data:
        parts.append(f"{data['tokens_per_s']:.0f} tokens/s")
    if "eta_s" in data:
        parts.append(f"ETA {duration(data['eta_s'])}")
    return "  ".join(parts)


PLAIN_FIGURES = (
    ("reward", "rollout.reward"),
    ("loss", "loss"),
    ("nll", "nll"),
    ("ESS/n", "ess_ratio"),
    ("validation nll", "validation.nll"),
)
PLAIN_SHARES = (("new task", "validation.accuracy"), ("old tasks", "retention.accuracy"))


def _gamma(data: Mapping[str, Any]) -> str:
    bound = data.get("bound_by")
    return f"γ {number(data['gamma'])}" + (f" ({bound})" if bound and bound != "none" else "")


def panel(progress: Progress) -> RenderableType:
    """The live view: bar, figures, last messages."""
    parts: list[RenderableType] = [_bar(progress), Text(""), _figures(progress)]
    if progress.messages:
        parts.append(Text(""))
    for level, message in progress.messages:
        parts.append(Text(message, style=LEVEL_STYLES.get(level, "dim"), overflow="ellipsis", no_wrap=True))
    title = f"[bold]{escape(progress.title)}[/]" if progress.title else None
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(1, 1))


def _bar(progress: Progress) -> RenderableType:
    total = progress.total_steps
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    steps = f"step {progress.step}/{total}" if total else f"step {progress.step}"
    speed = [] if progress.tokens_per_s is None else [f"{progress.tokens_per_s:.0f} tokens/s"]
    speed += [] if progress.eta_s is None else [f"ETA {duration(progress.eta_s)}"]
    bar = ProgressBar(
        total=total or 100,
        completed=progress.step if total else 0,
        pulse=total is None,
        complete_style="cyan",
        finished_style="green",
    )
    grid.add_row(steps, bar, "  ".join(speed))
    return grid


def _figures(progress: Progress) -> RenderableType:
    data = progress.latest
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
    left = [
        (
            "loss",
            Text.assemble(
                number(data.get("loss")),
                "  ",
                (sparkline(list(progress.losses.values()), SPARKLINE_WIDTH), "cyan"),
            ),
        ),
        ("nll, unweighted", Text(number(data.get("nll")))),
        ("ESS/n", _ess(data.get("ess_ratio"))),
        ("γ", Text("–" if data.get("gamma") is None else _gamma(data).removeprefix("γ "))),
    ]
    if "rollout.reward" in data:
        left.append(("reward", _changed(progress, "rollout.reward")))
    if data.get("beta") is not None:
        left.append(("β", Text(number(data["beta"]))))
    right = [
        ("new task", _changed(progress, "validation.accuracy")),
        ("old tasks", _changed(progress, "retention.accuracy")),
        ("KL to the start", Text(_nats(data.get("retention.kl_nats")))),
        ("validation nll", Text(number(data.get("validation.nll")))),
    ]
    for index in range(max(len(left), len(right))):
        a = left[index] if index < len(left) else ("", Text(""))
        b = right[index] if index < len(right) else ("", Text(""))
        grid.add_row(*a, *b)
    return grid


def _ess(ratio: float | None) -> Text:
    """Below .1 too few samples learn; above .8 it is close to plain SFT (METHODS.md section 7)."""
    if ratio is None:
        return Text("–")
    style = "red" if ratio < 0.1 else "green" if ratio <= 0.8 else ""
    return Text(number(ratio, 3), style=style)


def _changed(progress: Progress, name: str) -> Text:
    now, start = progress.latest.get(name), progress.first.get(name)
    text = Text(share(now))
    if now is not None and start is not None and now != start:
        text.append(f"  {100 * (now - start):+.1f}", style="green" if now > start else "red")
    return text


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{number(value)} nats"
