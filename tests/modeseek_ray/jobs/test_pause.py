"""Pause and resume, as the store, the reconciler and the driver see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.jobs.driver_store import Progress
from modeseek_ray.jobs.errors import IllegalTransitionError, StaleFenceError
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.store import Store

SETTINGS = ReconcilerSettings(status_every_s=0, pause_grace_s=100)


@pytest.fixture
def store_url(either_url: str) -> str:
    return either_url


@pytest.fixture
def passes(store: Store, home: Any, launcher: Any, validator: Any) -> Any:
    """Advance the reconciler by hand: `await passes(n)`."""
    import asyncio

    reconciler = Reconciler(store, home, launcher, validator, url="http://x", settings=SETTINGS)

    async def advance(number: int = 1) -> None:
        for _ in range(number):
            await reconciler.reconcile()
            while tasks := list(reconciler._tasks.values()):
                await asyncio.wait(tasks)

    return advance


def test_a_running_job_pauses_when_its_driver_says_so_and_resumes_in_its_old_place(
    store: Store, helpers: Any
) -> None:
    job, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    assert store.jobs.pause(job.id).state == "pausing"
    assert store.jobs.pause(job.id).version == store.jobs.get(job.id).version  # asked twice, changed once
    assert store.drivers.heartbeat(bearer, Progress(step=4))[0] == "pause"
    assert store.drivers.transition(bearer, "running").state == "pausing"  # it has not heard yet
    with pytest.raises(IllegalTransitionError, match="still pausing"):
        store.jobs.resume(job.id)
    store.drivers.commit_checkpoint(bearer, 4, Path("/c/4"), {}, "ft:c4")
    paused = store.drivers.transition(bearer, "paused")
    assert (paused.state, paused.status, paused.terminal) == ("paused", "paused", False)
    with pytest.raises(StaleFenceError):
        store.drivers.heartbeat(bearer, Progress(step=5))
    later = helpers.queue(store, "ftjob-later")
    resumed = store.jobs.resume(job.id)
    assert (resumed.state, resumed.desired) == ("queued", "run")
    places = store.queue.places(slots=1)
    assert [places[j.id].position for j in (resumed, later)] == [1, 2]
    again = store.attempts.begin(resumed, "second")
    assert (again.attempt, store.newest_checkpoints(job.id)) == (2, ["/c/4"])


def test_a_driver_that_was_faster_than_the_pause_succeeds(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    store.jobs.pause(job.id)
    assert store.drivers.transition(bearer, "succeeded").state == "succeeded"
    for ask in (store.jobs.pause, store.jobs.resume):
        with pytest.raises(IllegalTransitionError, match="Terminal jobs never change"):
            ask(job.id)


def test_a_queued_job_is_paused_at_once_and_may_be_cancelled(store: Store, helpers: Any) -> None:
    job = helpers.queue(store)
    with pytest.raises(IllegalTransitionError):
        store.jobs.resume(job.id)
    assert store.jobs.pause(job.id).state == "paused"
    assert store.jobs.cancel(job.id).state == "cancelled"


async def test_a_pause_during_validation_holds_the_job_before_it_starts(
    store: Store, helpers: Any, passes: Any, launcher: Any
) -> None:
    job = helpers.submit(store)
    assert store.jobs.pause(job.id).state == "accepted"
    await passes(4)
    assert store.jobs.get(job.id).state == "paused"
    assert launcher.launched == []
    store.jobs.resume(job.id)
    await passes()
    assert store.jobs.get(job.id).state == "starting"


def test_a_pause_that_has_not_begun_can_be_called_off(store: Store, helpers: Any) -> None:
    job = helpers.submit(store)
    store.jobs.pause(job.id)
    assert store.jobs.resume(job.id).desired == "run"


async def test_a_driver_that_does_not_pause_in_time_is_stopped_and_nothing_is_counted_against_it(
    store: Store, helpers: Any, passes: Any, launcher: Any, clock: Any
) -> None:
    """Its steps since the last checkpoint are trained again; a resumed job has all its attempts."""
    helpers.queue(store)
    await passes()
    store.jobs.pause("ftjob-one")
    clock.advance(99)
    await passes()
    assert (store.jobs.get("ftjob-one").state, launcher.stopped) == ("pausing", [])
    clock.advance(2)
    await passes(2)
    assert (store.jobs.get("ftjob-one").state, launcher.stopped) == ("paused", ["ftjob-one-1"])
    await passes(5)
    assert len(launcher.launched) == 1
    assert store.jobs.resume("ftjob-one").fruitless_attempts == 0
    await passes()
    assert [launch[1] for launch in launcher.launched] == [1, 2]


async def test_a_driver_that_dies_while_it_pauses_leaves_a_paused_job(
    store: Store, helpers: Any, passes: Any, launcher: Any
) -> None:
    helpers.queue(store)
    await passes()
    store.jobs.pause("ftjob-one")
    launcher.statuses["ftjob-one-1"] = "failed"
    await passes(2)
    assert store.jobs.get("ftjob-one").state == "paused"


def test_a_driver_without_space_pauses_its_job_and_the_user_resumes_it(store: Store, helpers: Any) -> None:
    """Nobody asked for the pause, so nothing starts it again before somebody has made space."""
    job, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    store.drivers.commit_checkpoint(bearer, 4, Path("/c/4"), {}, "ft:c4")
    error = {"code": "disk_full", "message": "a checkpoint needs 9 bytes, 3 are free.", "param": None}
    paused = store.drivers.transition(bearer, "paused", error=error)
    assert (paused.state, paused.desired, paused.error) == ("paused", "pause", None)
    assert store.drivers.transition(bearer, "paused", error=error).version == paused.version  # said again
    last = store.events.page(job.id, limit=1).data[0]
    assert (last.level, last.data["error"]["code"]) == ("error", "disk_full")
    assert "9 bytes" in last.message
    assert store.jobs.resume(job.id).state == "queued"
    assert store.newest_checkpoints(job.id) == ["/c/4"]


def test_a_driver_without_space_while_a_pause_was_asked_for_pauses_once(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    store.jobs.pause(job.id)
    paused = store.drivers.transition(bearer, "paused", error={"code": "disk_full", "message": "no space."})
    assert paused.state == "paused"
    states = [e.data.get("state") for e in store.events.after(job.id, 0)]
    assert states[-2:] == ["pausing", "paused"] and states.count("pausing") == 1
