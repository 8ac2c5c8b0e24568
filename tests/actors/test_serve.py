"""What `modeseek serve` does about jobs when it has ended Ray's head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.commands.serve import end_attempts
from modeseek_ray.jobs.driver_store import Bearer, Progress
from modeseek_ray.jobs.errors import StaleFenceError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.records import EventDraft, JobRecord
from modeseek_ray.jobs.store import Store


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.prepare()
    return home


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    store = Store(home.store_url)
    yield store
    store.close()


def start(store: Store, job_id: str) -> JobRecord:
    job, _ = store.jobs.submit(job_id, {"model": "m", "training_file": "file-1"})
    for state in ("validating", "queued"):
        job = store.jobs.move(job, state, EventDraft(state))
    return store.attempts.begin(job, "token")


def test_jobs_go_on_at_the_next_start_without_waiting_for_their_leases(home: Home, store: Store) -> None:
    job = start(store, "ftjob-runs")
    bearer = Bearer(job.id, 1, job.fence, "token")
    store.drivers.transition(bearer, "running")
    spool = home.spool(job.id, 1)
    spool.parent.mkdir(parents=True)
    spool.write_text(json.dumps({"seq": 1, "message": "the last step"}) + "\n")
    cancelled = store.jobs.cancel(start(store, "ftjob-ends").id)
    end_attempts(store, home)
    after = store.jobs.get(job.id)
    assert (after.state, after.fruitless_attempts) == ("recovering", 0)  # nobody's fault
    assert store.attempts.get(job.id, 1).ended_at is not None
    said = [event.message for event in store.events.after(job.id, 0)]
    assert said[-2:] == [
        "the last step",
        "Attempt 1 was lost: the service was ended, and Ray with it.",
    ]
    with pytest.raises(StaleFenceError):
        store.drivers.heartbeat(bearer, Progress())
    assert store.jobs.get(cancelled.id).state == "cancelling"  # its end is under way


def test_one_job_that_cannot_be_let_go_does_not_keep_the_others(
    home: Home, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start(store, "ftjob-a"), start(store, "ftjob-b")
    lose = store.attempts.lose

    def refuse_first(job: JobRecord, *args: object, **options: object) -> JobRecord:
        if job.id == first.id:
            raise OSError("no space left on device")
        return lose(job, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store.attempts, "lose", refuse_first)
    end_attempts(store, home)
    assert [store.jobs.get(job.id).state for job in (first, second)] == ["starting", "recovering"]
