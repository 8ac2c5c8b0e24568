"""One service, one tiny job per cell: break something at a named point, and look at what is left.

A cell holds when the job succeeds all the same, its weights are bit for bit those of the run without a
fault, no event is missing or doubled, nothing changed after the end, and no more steps were trained
twice than lie between two checkpoints.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeseek_ray.client import Client
from modeseek_ray.errors import ServiceError
from tests.conftest import find_free_port
from tests.e2e.conftest import RunningService

STEPS, CHECKPOINT_EVERY = 12, 4
DEADLINE_S = 240
HOOKS = Path(__file__).parent / "hooks"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cell:
    """What to do, where, when, at which call; `rank` where one of several trainers is meant."""

    point: str
    when: str
    nth: int = 1
    rank: int | None = None
    action: str = "SIGKILL"

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" of rank {self.rank}"
        return f"{self.action} {self.when} {self.point}{rank} #{self.nth}"

    def plan(self) -> str:
        return json.dumps({k: v for k, v in vars(self).items() if v is not None})


CELLS = [
    Cell("driver.setup", "before"),
    Cell("driver.score", "after"),
    Cell("driver.step", "before", 1),
    Cell("driver.step", "after", 6),
    Cell("driver.save", "before", 2),
    Cell("driver.finish", "before", 1),
    Cell("driver.finish", "before", 2),
    Cell("driver.finish", "after", 2),  # renamed, not committed
    Cell("driver.commit", "after", 1),  # committed, nobody knows
    Cell("driver.commit", "after", 3),
    Cell("driver.export", "before"),
    Cell("driver.export", "after"),
    Cell("driver.check", "after"),
    Cell("driver.end", "before", 2),  # all is done, but not said
    Cell("rank.step", "before", 3, rank=0),
    Cell("rank.step", "after", 7, rank=0),
    Cell("rank.step", "before", 6, rank=1),
    Cell("rank.save", "before", 2, rank=1),
    Cell("rank.save", "after", 2, rank=0),
    Cell("rank.export", "before", 1, rank=0),
    Cell("api.begin", "after"),
    Cell("api.events", "before", 3),
    Cell("api.events", "after", 3),
    Cell("api.commit", "before", 2),
    Cell("api.commit", "after", 2),
    Cell("api.transition", "after", 2),
]
# What `make test` can afford: a trainer killed in the middle of a step.
IN_TESTS = [Cell("rank.step", "before", 6, rank=1)]


@dataclass(frozen=True)
class Finding:
    """How a cell went. `problems` is empty where every promise was kept."""

    cell: Cell | None
    seconds: float
    attempts: int
    redone_steps: int
    weights_sha256: str
    problems: list[str] = field(default_factory=list)


class Laboratory:
    """A running service with hooks in all its processes. `with Laboratory(directory, model) as laboratory:`."""

    def __init__(self, directory: Path, model: Path) -> None:
        self._directory = directory
        self._model = model
        self._plan = directory / "plan.json"
        self._port = find_free_port()
        self._service: RunningService | None = None

    def __enter__(self) -> Laboratory:
        with hooked(self._plan):
            self._service = RunningService(self._directory / "home", root=self._model.parent, port=self._port)
            self._service.__enter__()
        rows = [{"prompt": f"say {i} ", "completion": f"{i} " * 20} for i in range(64)]
        (self._directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._service is not None
        self._service.__exit__()

    def run(self, cell: Cell | None, expected_sha256: str | None = None) -> Finding:
        """One job, with the fault of `cell`."""
        fired = Path(f"{self._plan}.fired")
        fired.unlink(missing_ok=True)
        self._plan.write_text("{}" if cell is None else cell.plan())
        started = time.monotonic()
        with Client(f"http://127.0.0.1:{self._port}") as client:
            job = self._until_ended(client, self._submit(client))
            events = client.events(job["id"])
        seconds = time.monotonic() - started
        record = self._directory / "home" / "jobs" / job["id"] / "results" / "job.json"
        sha256 = json.loads(record.read_text()).get("weights_sha256", "") if record.exists() else ""
        trained = [e["data"]["step"] for e in events if "loss" in (e["data"] or {})]
        problems = list(history_problems(job, events, trained))
        if cell is not None and not fired.exists():
            problems.append("the fault never happened")
        if expected_sha256 is not None and sha256 != expected_sha256:
            problems.append("other weights than without the fault")
        return Finding(cell, seconds, job["attempt"], len(trained) - len(set(trained)), sha256, problems)

    def _submit(self, client: Client) -> str:
        training = {
            "epochs": 3,
            "batch_size": 16,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "checkpoint_every": CHECKPOINT_EVERY,
        }
        file_id = client.upload(self._directory / "train.jsonl")["id"]
        body = {
            "model": str(self._model),
            "training_file": file_id,
            "method": {"type": "weighted", "weighted": {"preset": "mode_seeking", "training": training}},
            "resources": {"trainers": 2, "zero_stage": 2},
        }
        return str(client.submit(body)["id"])

    def _until_ended(self, client: Client, job_id: str) -> dict[str, Any]:
        """Poll, and start the service again whenever it is the one that was killed."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self._revive()
            try:
                job = client.job(job_id)
            except ServiceError:
                time.sleep(0.3)
                continue
            if job["status"] in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(0.2)
        raise TimeoutError(f"{job_id} did not end within {DEADLINE_S} s: {job}")

    def _revive(self) -> None:
        assert self._service is not None and self._service.process is not None
        if self._service.process.poll() is not None:
            with hooked(self._plan):
                self._service.__enter__()


@contextmanager
def hooked(plan: Path) -> Iterator[None]:
    """The environment of processes that load `hooks/sitecustomize.py`."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "MODESEEK_FAULT_PLAN")}
    paths = [str(HOOKS), str(ROOT), *filter(None, [before["PYTHONPATH"]])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), MODESEEK_FAULT_PLAN=str(plan))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def history_problems(job: dict[str, Any], events: list[dict[str, Any]], trained: list[int]) -> Iterator[str]:
    """What must not be seen in a history, whatever was broken."""
    if job["status"] != "succeeded":
        yield f"the job ended as {job['status']}: {job.get('error')}"
    numbers = [int(event["id"].rpartition("-")[2]) for event in events]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"events are missing or out of order: {numbers}"
    if sorted(set(trained)) != list(range(1, STEPS + 1)):
        yield f"steps in the history: {trained}"
    if len(trained) - len(set(trained)) > CHECKPOINT_EVERY:
        yield f"{len(trained) - len(set(trained))} steps were trained twice"
    ends = [e for e in events if (e["data"] or {}).get("state") in ("succeeded", "failed", "cancelled")]
    if len(ends) != 1 or ends[0] is not events[-1]:
        yield "the history does not end with its one end"
