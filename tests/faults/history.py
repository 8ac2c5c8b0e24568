"""What must not be seen in a history, whatever was broken: from the client's log and from the store.

The client writes down what it was answered, what events it saw and how each job looked when it had
ended; the store is read as it lies on the disk, by a connection of its own.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ENDS = ("succeeded", "failed", "cancelled", "rejected")
Trained = Counter[tuple[int, int]]  # (step, row) -> how often


@dataclass
class ClientLog:
    """What one client was told."""

    answered: dict[str, str] = field(default_factory=dict)  # idempotency key -> job
    seen: dict[str, list[str]] = field(default_factory=dict)  # job -> events, in the order they came
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)  # job -> how it looked when it had ended


@dataclass(frozen=True)
class Attempt:
    number: int
    fence: int
    created_at: float
    ended_at: float | None


@dataclass(frozen=True)
class Event:
    sequence: int
    created_at: float
    attempt: int | None
    data: dict[str, Any]

    @property
    def state(self) -> str | None:
        return self.data.get("state")


@dataclass(frozen=True)
class Stored:
    """One job, as the store has it."""

    job_id: str
    state: str
    attempts: list[Attempt]
    events: list[Event]

    @property
    def steps(self) -> list[tuple[float, int]]:
        """(when, step) of each step that was recorded."""
        return [(e.created_at, e.data["step"]) for e in self.events if "loss" in e.data]


def read(database: Path, job_id: str) -> Stored:
    """Raises `KeyError` for a job that is not there."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        state = connection.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if state is None:
            raise KeyError(job_id)
        attempts = connection.execute(
            "SELECT number, fence, created_at, ended_at FROM attempts WHERE job_id = ? ORDER BY number",
            (job_id,),
        ).fetchall()
        events = connection.execute(
            "SELECT sequence, created_at, attempt, data FROM events WHERE job_id = ? ORDER BY sequence",
            (job_id,),
        ).fetchall()
    found = [Event(number, at, attempt, json.loads(data) or {}) for number, at, attempt, data in events]
    return Stored(job_id, state[0], [Attempt(*row) for row in attempts], found)


def jobs_by_key(database: Path) -> tuple[dict[str, str], list[str]]:
    """(job by idempotency key, all jobs)."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        keys = dict(connection.execute("SELECT key, job_id FROM idempotency").fetchall())
        return keys, [row[0] for row in connection.execute("SELECT id FROM jobs ORDER BY number")]


def trained(results: Path) -> Trained:
    """How often each row was trained in each step, from the job's weights file."""
    table = pq.read_table(results / "weights.parquet", columns=["step", "row"])
    return Counter(zip(table["step"].to_pylist(), table["row"].to_pylist(), strict=True))


def submission_problems(log: ClientLog, database: Path) -> Iterator[str]:
    """An answered job is there, once, and nothing else is."""
    keys, jobs = jobs_by_key(database)
    for key, job_id in log.answered.items():
        if job_id not in jobs:
            yield f"{job_id} was answered and is missing"
        if keys.get(key) != job_id:
            yield f"the key of {job_id} leads to {keys.get(key)}"
    for job_id in set(jobs) - set(log.answered.values()):
        yield f"{job_id} exists and was never answered"


def job_problems(stored: Stored, log: ClientLog) -> Iterator[str]:
    """Gaps, changes after the end, two live fences."""
    numbers = [event.sequence for event in stored.events]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"events are missing or doubled: {numbers}"
    seen = [int(name.rpartition("-")[2]) for name in log.seen.get(stored.job_id, [])]
    if seen != numbers[: len(seen)]:
        yield f"the client saw events {seen}, the store has {numbers}"
    ends = [event.sequence for event in stored.events if event.state in ENDS]
    if stored.state in ENDS and ends != [len(numbers)]:
        yield f"the history does not end with its one end: {ends} of {len(numbers)}"
    for before, after in zip(stored.attempts, stored.attempts[1:], strict=False):
        if after.fence <= before.fence:
            yield f"attempt {after.number} has fence {after.fence} after {before.fence}"
        if before.ended_at is None or before.ended_at > after.created_at:
            yield f"attempts {before.number} and {after.number} held the job at the same time"
    spoke = [event.attempt for event in stored.events if event.attempt is not None]
    if spoke != sorted(spoke):
        yield f"an attempt that was over was heard: {spoke}"


def step_problems(stored: Stored, steps: int, checkpoint_every: int, faults: int = 1) -> Iterator[str]:
    """Every step is there, and no more were done twice than lie between two checkpoints."""
    done = [step for _, step in stored.steps]
    if sorted(set(done)) != list(range(1, steps + 1)):
        yield f"steps in the history: {done}"
    redone = len(done) - len(set(done))
    if redone > checkpoint_every * faults:
        yield f"{redone} steps were trained twice"
