"""A store on disk, a clock that tests turn, and fakes behind the launcher and validator protocols."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modeseek_ray.jobs.driver_store import Bearer
from modeseek_ray.jobs.launcher import Capacity, LaunchStatus, ValidationOutcome
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import EventDraft, JobRecord
from modeseek_ray.jobs.store import Store


@dataclass
class Clock:
    """Seconds, as the test says."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeLauncher:
    """Remembers what was asked; a driver runs until the test says otherwise, or it is stopped."""

    launched: list[tuple[str, int, Path]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    statuses: dict[str, LaunchStatus] = field(default_factory=dict)
    has: Capacity | None = None
    obeys_stop: bool = True
    refusal: Exception | None = None  # what it raises instead of an answer

    async def launch(self, job_id: str, attempt: int, secret_path: Path) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.launched.append((job_id, attempt, secret_path))
        submission_id = f"{job_id}-{attempt}"
        self.statuses.setdefault(submission_id, "running")
        return submission_id

    async def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        if self.obeys_stop:
            self.statuses[submission_id] = "stopped"

    async def status(self, submission_id: str) -> LaunchStatus:
        if self.refusal is not None:
            raise self.refusal
        return self.statuses.get(submission_id, "unknown")

    async def capacity(self) -> Capacity | None:
        return self.has

    async def logs(self, submission_id: str) -> str | None:
        return f"what {submission_id} printed\n" if submission_id in self.statuses else None


@dataclass
class FakeValidator:
    """Says what the test wants it to say."""

    outcome: ValidationOutcome = field(default_factory=lambda: ValidationOutcome(True, report={"rows": 3}))
    validated: list[str] = field(default_factory=list)

    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        self.validated.append(job_id)
        return self.outcome


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


@pytest.fixture
def store_url(home: Home) -> str:
    """SQLite; test files that are about the store itself run on PostgreSQL, too."""
    return home.store_url


@pytest.fixture(params=["sqlite", "postgresql"])
def either_url(request: pytest.FixtureRequest, home: Home) -> str:
    """The URL of an empty store, on each of the two databases."""
    return home.store_url if request.param == "sqlite" else request.getfixturevalue("postgres")()


@pytest.fixture
def store(store_url: str, clock: Clock) -> Iterator[Store]:
    store = Store(store_url, clock=clock)
    yield store
    store.close()


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def validator() -> FakeValidator:
    return FakeValidator()


CONFIG = {"model": "playground/moe", "training_file": "file-1", "metadata": {"team": "a"}}


def submit(store: Store, job_id: str = "ftjob-one", **options: object) -> JobRecord:
    return store.jobs.submit(job_id, CONFIG, **options)[0]  # type: ignore[arg-type]


def queue(store: Store, job_id: str = "ftjob-one") -> JobRecord:
    job = store.jobs.move(submit(store, job_id), "validating", EventDraft("validating"))
    return store.jobs.move(job, "queued", EventDraft("queued"))


def start(store: Store, job_id: str = "ftjob-one", token: str = "token") -> tuple[JobRecord, Bearer]:
    job = store.attempts.begin(queue(store, job_id), token)
    return job, Bearer(job.id, job.attempt, job.fence, token)


@pytest.fixture
def helpers() -> type:
    """The functions above, for test files that pytest imports by path."""

    class Helpers:
        config = CONFIG
        submit = staticmethod(submit)
        queue = staticmethod(queue)
        start = staticmethod(start)

    return Helpers
