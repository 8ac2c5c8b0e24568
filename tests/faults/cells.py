"""The matrix: what is done to whom, where, at which call. `pairwise` selects cells that meet every pair of values.

victim   driver, rank 0, rank 1, engine, scorer, API, Ray's head
point    what it is doing
action   SIGKILL, SIGSTOP (for good), STALL (stopped, then continued), SLOW, RAY (its head dies),
         ENOSPC (the call raises it), FULL (the volume that is written to has no byte left)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Kind = Literal["offline", "online"]


@dataclass(frozen=True)
class Cell:
    """`rank` where one of several trainers is meant; `seconds` of STALL and SLOW, and of a full store."""

    point: str
    when: str
    nth: int = 1
    rank: int | None = None
    action: str = "SIGKILL"
    kind: Kind = "offline"
    seconds: float = 2.0

    @property
    def volume(self) -> Literal["data", "store"] | None:
        """What is full: the service writes the store, all others the job's checkpoints."""
        if self.action != "FULL":
            return None
        return "store" if self.point.startswith("api.") else "data"

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" of rank {self.rank}"
        online = "online: " if self.kind == "online" else ""
        return f"{online}{self.action} {self.when} {self.point}{rank} #{self.nth}"

    def plan(self, directory: str = "") -> str:
        """As the hooks read it. `directory`: of the volume to fill."""
        said = {k: v for k, v in vars(self).items() if v is not None}
        return json.dumps({**said, "directory": directory})


OFFLINE = [
    # First: SQLite's log has not grown yet, so that writing needs space.
    Cell("api.events", "before", 3, action="FULL", seconds=4.0),
    Cell("driver.setup", "before"),
    Cell("driver.score", "after"),
    Cell("driver.step", "before", 1),
    Cell("driver.step", "after", 6),
    Cell("driver.step", "after", 5, action="SIGSTOP"),
    Cell("driver.step", "before", 7, action="SLOW"),
    Cell("driver.save", "before", 2),
    Cell("driver.finish", "before", 1),
    Cell("driver.finish", "before", 2),
    Cell("driver.finish", "before", 2, action="ENOSPC"),
    Cell("driver.finish", "after", 2),  # renamed, not committed
    Cell("driver.commit", "before", 2),  # the same, one call later
    Cell("driver.commit", "after", 1),  # committed, nobody knows
    Cell("driver.commit", "after", 3),
    Cell("driver.export", "before"),
    Cell("driver.export", "after"),
    Cell("driver.check", "after"),
    Cell("driver.end", "before", 2),  # all is done, but not said
    Cell("scorer.block", "before"),
    Cell("scorer.block", "after"),
    Cell("rank.step", "before", 3, rank=0),
    Cell("rank.step", "after", 7, rank=0),
    Cell("rank.step", "before", 6, rank=1),
    Cell("rank.step", "before", 6, rank=1, action="SIGSTOP"),
    Cell("rank.step", "after", 5, rank=0, action="SLOW"),
    Cell("rank.save", "before", 2, rank=1),
    Cell("rank.save", "after", 2, rank=0),
    Cell("rank.save", "before", 2, rank=0, action="ENOSPC"),
    Cell("rank.save", "before", 2, rank=0, action="FULL"),
    Cell("rank.save", "before", 1, rank=1, action="SIGSTOP"),
    Cell("rank.export", "before", 1, rank=0),
    Cell("rank.export", "before", 1, rank=0, action="ENOSPC"),
    Cell("api.submit", "before"),
    Cell("api.submit", "after"),
    Cell("api.submit", "before", action="ENOSPC"),
    Cell("api.begin", "after"),
    Cell("api.events", "before", 3),
    Cell("api.events", "after", 3),
    Cell("api.events", "before", 3, action="STALL"),
    Cell("api.commit", "before", 2),
    Cell("api.commit", "after", 2),
    Cell("api.commit", "before", 2, action="ENOSPC"),
    Cell("api.commit", "after", 1, action="STALL", seconds=16.0),  # longer than the lease
    Cell("api.transition", "after", 2),
    Cell("driver.step", "before", 6, action="RAY"),  # the driver sees Ray's head die
    Cell("driver.finish", "before", 2, action="RAY"),
]
ONLINE = [
    Cell("driver.rollout", "before", 2, kind="online"),
    Cell("driver.rollout", "after", 2, kind="online"),
    Cell("driver.rollout", "before", 2, action="ENOSPC", kind="online"),
    Cell("driver.sync", "before", 2, kind="online"),
    Cell("driver.sync", "after", 2, kind="online"),
    Cell("engine.write", "before", 2, kind="online"),
    Cell("engine.write", "before", 3, action="SIGSTOP", kind="online"),
    Cell("engine.update", "after", 2, kind="online"),
    Cell("rank.step", "after", 3, rank=0, kind="online"),
    Cell("driver.finish", "after", 2, kind="online"),
    Cell("api.events", "after", 4, kind="online"),
    Cell("rank.weights", "before", 2, rank=0, kind="online"),
    Cell("rank.weights", "after", 2, rank=1, kind="online"),
    Cell("driver.step", "before", 3, action="RAY", kind="online"),
    Cell("driver.rollout", "after", 2, action="RAY", kind="online"),
    Cell("driver.sync", "before", 2, action="RAY", kind="online"),
]
CELLS = [*OFFLINE, *ONLINE]


_PHASES = {
    "start": ("setup", "begin", "submit"),
    "score": ("score", "block"),
    "rollout": ("rollout", "write"),
    "step": ("step", "events"),
    "sync": ("sync", "update", "weights"),
    "checkpoint": ("save", "finish", "commit"),
    "end": ("export", "check", "end", "transition"),
}


def columns(cell: Cell) -> tuple[str, str, str, str]:
    """Victim, what the job was at, before or after, what was done."""
    owner, point = cell.point.split(".")
    victim = "ray" if cell.action == "RAY" else owner if cell.rank is None else f"rank {cell.rank}"
    phase = next(name for name, points in _PHASES.items() if point in points)
    return victim, phase, cell.when, cell.action


def pairwise(cells: list[Cell]) -> list[Cell]:
    """As few of `cells` as the greedy choice finds, such that every pair of values of two columns is met."""
    missing = {pair for cell in cells for pair in _pairs(cell)}
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: len(missing & _pairs(cell)))
        chosen.append(best)
        missing -= _pairs(best)
    return [cell for cell in cells if cell in chosen]


def _pairs(cell: Cell) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    values = list(enumerate(columns(cell)))
    return {(a, b) for i, a in enumerate(values) for b in values[i + 1 :]}
