"""The reconciler, pass by pass, against a real store and a launcher that does what the test says."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.driver_store import Bearer, Progress
from modeseek_ray.jobs.errors import StaleFenceError
from modeseek_ray.jobs.launcher import ValidationOutcome
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.store import Store

QUICK = ReconcilerSettings(cancel_grace_s=0.4, stop_timeout_s=0.4, status_every_s=0)


class Scene:
    """A reconciler that the test advances by hand, and the driver's side of it."""

    def __init__(self, store: Store, home: Home, launcher: Any, validator: Any) -> None:
        self.store, self.home, self.launcher = store, home, launcher
        self.reconciler = Reconciler(store, home, launcher, validator, url="http://x", settings=QUICK)

    async def passes(self, number: int = 1) -> None:
        for _ in range(number):
            await self.reconciler.reconcile()
            while tasks := list(self.reconciler._tasks.values()):
                await asyncio.wait(tasks)

    def state(self, job_id: str = "ftjob-one") -> str:
        return self.store.jobs.get(job_id).state

    def bearer(self, job_id: str = "ftjob-one") -> Bearer:
        job = self.store.jobs.get(job_id)
        secret = json.loads(self.home.secret(job_id, job.attempt).read_text())
        return Bearer(job_id, job.attempt, secret["fence"], secret["token"])


@pytest.fixture
def scene(store: Store, home: Home, launcher: Any, validator: Any) -> Scene:
    return Scene(store, home, launcher, validator)


async def test_from_accepted_to_running(scene: Scene, helpers: Any) -> None:
    helpers.submit(scene.store)
    await scene.passes()
    assert scene.state() == "queued"
    await scene.passes()
    assert scene.state() == "starting"
    [(job_id, attempt, secret)] = scene.launcher.launched
    assert (job_id, attempt) == ("ftjob-one", 1)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert scene.store.attempts.get("ftjob-one", 1).submission_id == "ftjob-one-1"  # type: ignore[union-attr]
    scene.store.drivers.transition(scene.bearer(), "running")
    await scene.passes(3)
    assert scene.state() == "running"
    assert len(scene.launcher.launched) == 1


async def test_bad_data_is_rejected_with_its_reason(scene: Scene, validator: Any, helpers: Any) -> None:
    error = {"code": "empty_completion", "message": "a.jsonl:3: empty completion", "param": "training_file"}
    validator.outcome = ValidationOutcome(False, error, {"bad_rows": 1})
    helpers.submit(scene.store)
    await scene.passes()
    job = scene.store.jobs.get("ftjob-one")
    assert (job.state, job.status, job.error) == ("rejected", "failed", error)
    assert scene.launcher.launched == []


async def test_a_validation_that_crashes_rejects_the_job(scene: Scene, validator: Any, helpers: Any) -> None:
    async def crash(_: str) -> ValidationOutcome:
        raise RuntimeError("boom")

    validator.validate = crash
    helpers.submit(scene.store)
    await scene.passes()
    job = scene.store.jobs.get("ftjob-one")
    assert job.state == "rejected"
    assert job.error is not None and job.error["code"] == "validation_failed"


async def test_a_job_cancelled_during_validation_stays_cancelled(
    scene: Scene, validator: Any, helpers: Any
) -> None:
    async def cancelled_meanwhile(job_id: str) -> ValidationOutcome:
        scene.store.jobs.cancel(job_id)
        return ValidationOutcome(True)

    validator.validate = cancelled_meanwhile
    helpers.submit(scene.store)
    await scene.passes(2)
    assert scene.state() == "cancelled"


async def test_first_come_first_served_up_to_the_limit(scene: Scene, helpers: Any) -> None:
    for name in ("ftjob-a", "ftjob-b", "ftjob-c"):
        helpers.queue(scene.store, name)
    await scene.passes(2)
    assert [scene.state(f"ftjob-{x}") for x in "abc"] == ["starting", "queued", "queued"]
    bearer = scene.bearer("ftjob-a")
    scene.store.drivers.transition(bearer, "running")
    scene.store.drivers.transition(bearer, "succeeded")
    await scene.passes()
    assert [scene.state(f"ftjob-{x}") for x in "abc"] == ["succeeded", "starting", "queued"]


async def test_a_crash_between_begin_and_launch_is_mended(scene: Scene, helpers: Any) -> None:
    """The store says starting, nothing was launched, and the process that knew is gone."""
    helpers.queue(scene.store)
    job = scene.store.jobs.get("ftjob-one")
    scene.home.secret(job.id, 1).parent.mkdir(parents=True)
    scene.home.secret(job.id, 1).write_text("{}")
    scene.store.attempts.begin(job, "token")
    await scene.passes()
    assert [launch[:2] for launch in scene.launcher.launched] == [("ftjob-one", 1)]


async def test_a_driver_that_falls_silent_is_replaced_and_shut_out(
    scene: Scene, clock: Any, helpers: Any
) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    old = scene.bearer()
    scene.store.drivers.transition(old, "running")
    scene.store.drivers.heartbeat(old, Progress(step=1))
    clock.advance(59)
    await scene.passes()
    assert scene.state() == "running"
    clock.advance(2)
    await scene.passes()
    assert scene.state() == "recovering"
    assert scene.launcher.stopped == ["ftjob-one-1"]
    with pytest.raises(StaleFenceError):
        scene.store.drivers.heartbeat(old, Progress(step=2))
    await scene.passes(2)
    assert scene.state() == "starting"
    assert scene.store.drivers.heartbeat(scene.bearer(), Progress())[0] == "run"
    assert [launch[1] for launch in scene.launcher.launched] == [1, 2]


async def test_a_driver_that_died_is_replaced_before_its_lease_ends(scene: Scene, helpers: Any) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    scene.launcher.statuses["ftjob-one-1"] = "failed"
    await scene.passes(3)
    assert [launch[1] for launch in scene.launcher.launched] == [1, 2]


async def test_an_unreachable_cluster_says_nothing_about_drivers(scene: Scene, helpers: Any) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    scene.store.drivers.transition(scene.bearer(), "running")
    scene.launcher.refusal = WorkerError("no answer")
    await scene.passes(3)
    assert scene.state() == "running"


async def test_a_driver_that_beats_but_makes_no_progress_is_replaced(
    scene: Scene, clock: Any, helpers: Any
) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    bearer = scene.bearer()
    scene.store.drivers.transition(bearer, "running")
    for _ in range(11):
        scene.store.drivers.heartbeat(bearer, Progress(step=4, section="step", deadline_s=100))
        await scene.passes()
        assert scene.state() == "running"
        clock.advance(10)
    scene.store.drivers.heartbeat(bearer, Progress(step=4, section="step", deadline_s=100))
    await scene.passes()
    assert scene.state() == "recovering"


async def test_progress_moves_the_deadline(scene: Scene, clock: Any, helpers: Any) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    bearer = scene.bearer()
    scene.store.drivers.transition(bearer, "running")
    for step in range(5):
        scene.store.drivers.heartbeat(bearer, Progress(step=step, section="step", deadline_s=60))
        clock.advance(50)
        await scene.passes()
    assert scene.state() == "running"


async def lose_attempt(scene: Scene, commit_step: int | None = None) -> None:
    """One attempt from launch to loss; it may commit a checkpoint first."""
    job = scene.store.jobs.get("ftjob-one")
    if commit_step is not None:
        scene.store.drivers.commit_checkpoint(
            scene.bearer(), commit_step, Path("/c"), {}, f"ft:{commit_step}"
        )
    scene.launcher.statuses[f"ftjob-one-{job.attempt}"] = "failed"
    await scene.passes(3)


async def test_three_attempts_without_a_new_step_are_enough(scene: Scene, helpers: Any) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    await lose_attempt(scene, commit_step=4)  # this one got somewhere
    await lose_attempt(scene)
    await lose_attempt(scene)
    assert scene.state() == "starting"
    await lose_attempt(scene)
    job = scene.store.jobs.get("ftjob-one")
    assert (job.state, job.attempt) == ("failed", 4)
    assert job.error is not None and job.error["code"] == "attempts_exhausted"


async def give_up(scene: Scene, code: str) -> None:
    """One attempt whose driver says why it cannot go on."""
    scene.store.drivers.give_up(scene.bearer(), {"code": code, "message": "what it said."})
    await scene.passes(3)


async def test_a_job_waits_for_room_as_long_as_it_takes(scene: Scene, helpers: Any) -> None:
    """Nothing was tried where the cluster had no room; what was tried and lost is counted."""
    helpers.queue(scene.store)
    await scene.passes()
    for _ in range(5):
        await give_up(scene, "no_resources")
    job = scene.store.jobs.get("ftjob-one")
    assert (job.state, job.attempt, job.fruitless_attempts) == ("starting", 6, 0)
    said = [event.message for event in scene.store.events.after("ftjob-one", 0)]
    assert "Attempt 5 was lost: no_resources: what it said." in said
    await give_up(scene, "worker_died")
    await give_up(scene, "no_resources")
    await give_up(scene, "worker_failed")
    assert scene.state() == "starting"
    await give_up(scene, "internal_error")
    job = scene.store.jobs.get("ftjob-one")
    assert job.state == "failed" and job.error is not None
    assert (
        job.error["code"] == "attempts_exhausted" and "internal_error: what it said." in job.error["message"]
    )


async def test_progress_gives_three_more_attempts(scene: Scene, helpers: Any) -> None:
    helpers.queue(scene.store)
    await scene.passes()
    for step in (None, None, 4, None, None):
        await lose_attempt(scene, commit_step=step)
    assert scene.state() == "starting"
    assert scene.store.jobs.get("ftjob-one").attempt == 6


async def test_a_launch_waits_for_a_cluster_that_is_away(scene: Scene, clock: Any, helpers: Any) -> None:
    """The head is down for ten minutes: one attempt, launched when it is back."""
    scene.launcher.refusal = WorkerError("no answer")
    helpers.queue(scene.store)
    for _ in range(10):
        await scene.passes()
        clock.advance(60)
    assert scene.state() == "starting"
    scene.launcher.refusal = None
    await scene.passes()
    assert [launch[:2] for launch in scene.launcher.launched] == [("ftjob-one", 1)]


async def test_a_driver_that_a_restarted_cluster_forgot_is_replaced(
    scene: Scene, clock: Any, helpers: Any
) -> None:
    """It never sent a heartbeat, and nobody knows it: no need to wait for the long lease of a start."""
    helpers.queue(scene.store)
    await scene.passes()
    scene.launcher.statuses.clear()
    await scene.passes()
    clock.advance(59)
    await scene.passes()
    assert scene.state() == "starting"
    assert len(scene.launcher.launched) == 1
    clock.advance(2)
    await scene.passes(3)
    assert [launch[1] for launch in scene.launcher.launched] == [1, 2]


async def test_a_cancel_during_the_launch_stops_what_was_launched(live: Scene, helpers: Any) -> None:
    release = asyncio.Event()
    launch = live.launcher.launch

    async def slow(*arguments: Any) -> str:
        await release.wait()
        return await launch(*arguments)

    live.launcher.launch = slow
    helpers.queue(live.store)
    await live.reconciler.reconcile()
    live.store.jobs.cancel("ftjob-one")
    await live.reconciler.reconcile()
    await asyncio.sleep(0.05)
    release.set()
    await live.passes()
    assert live.state() == "cancelled"
    assert live.launcher.stopped == ["ftjob-one-1"]


async def test_a_driver_that_cannot_be_started_fails_the_job_in_the_end(scene: Scene, helpers: Any) -> None:
    scene.launcher.refusal = RuntimeError("no such interpreter")
    helpers.queue(scene.store)
    await scene.passes(10)
    job = scene.store.jobs.get("ftjob-one")
    assert job.state == "failed"
    assert job.error is not None and "no such interpreter" in job.error["message"]


@pytest.fixture
def live(home: Home, launcher: Any, validator: Any, helpers: Any) -> Any:
    """A scene on the real clock, with one running job."""
    store = Store(home.store_url)
    yield Scene(store, home, launcher, validator)
    store.close()


async def run_one(live: Scene, helpers: Any) -> Bearer:
    helpers.queue(live.store)
    await live.passes()
    live.store.drivers.transition(live.bearer(), "running")
    return live.bearer()


async def test_a_driver_that_ends_by_itself_is_not_stopped(live: Scene, helpers: Any) -> None:
    bearer = await run_one(live, helpers)
    live.store.jobs.cancel("ftjob-one")
    ending = asyncio.create_task(live.passes())
    await asyncio.sleep(0.1)
    live.store.drivers.transition(bearer, "cancelled")
    await ending
    assert live.state() == "cancelled"
    assert live.launcher.stopped == []


@pytest.mark.parametrize("obeys_stop", [True, False])
async def test_a_driver_that_does_not_is_stopped_after_the_grace(
    live: Scene, helpers: Any, obeys_stop: bool
) -> None:
    """A cluster that does not stop it cannot keep the job from ending: the fence shuts the driver out."""
    bearer = await run_one(live, helpers)
    live.launcher.obeys_stop = obeys_stop
    live.store.jobs.cancel("ftjob-one")
    started = asyncio.get_running_loop().time()
    await live.passes()
    assert live.state() == "cancelled"
    assert live.launcher.stopped == ["ftjob-one-1"]
    assert asyncio.get_running_loop().time() - started < 3 * (QUICK.cancel_grace_s + QUICK.stop_timeout_s)
    with pytest.raises(StaleFenceError):
        live.store.drivers.heartbeat(bearer, Progress())


def test_the_defaults_keep_the_promise_of_15_seconds() -> None:
    settings = ReconcilerSettings()
    assert settings.pass_every_s + settings.cancel_grace_s + settings.stop_timeout_s < 15


async def test_only_the_leader_acts(scene: Scene, launcher: Any, validator: Any, helpers: Any) -> None:
    second = Scene(scene.store, scene.home, launcher, validator)
    await scene.passes()
    helpers.submit(scene.store)
    await second.passes(3)
    assert scene.state() == "accepted"
    await scene.passes()
    assert scene.state() == "queued"


async def test_run_wakes_at_once_and_ends_cleanly(live: Scene, helpers: Any) -> None:
    task = asyncio.create_task(live.reconciler.run())
    await asyncio.sleep(0.05)
    helpers.submit(live.store)
    live.reconciler.wake()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if live.launcher.launched:
            break
    assert live.launcher.launched
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert live.store.hold_lease("reconciler", "successor", 15)
