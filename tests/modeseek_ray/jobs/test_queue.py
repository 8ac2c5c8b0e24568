"""Who is next and when, by hand; and the reconciler that goes by it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from modeseek_ray.jobs.queue import Place, places, startable
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.records import JobRecord
from modeseek_ray.jobs.store import Store


@pytest.fixture
def make(store: Store, helpers: Any) -> Any:
    """A job with this id, tenant and time left."""

    def job(name: str, tenant: str = "default", eta_s: float | None = None) -> JobRecord:
        record = helpers.submit(store, f"ftjob-{name}")
        return replace(record, tenant_id=tenant, eta_s=eta_s)

    return job


def names(jobs: list[JobRecord]) -> str:
    return "".join(job.id.removeprefix("ftjob-") for job in jobs)


def test_a_tenant_at_its_limit_keeps_nobody_waiting_behind_it(make: Any) -> None:
    queue = [make("a", "x"), make("b", "x"), make("c", "y"), make("d", "y")]
    limits = {"x": 1, "y": None}
    assert names(startable(queue, [], slots=3, limits=limits)) == "acd"
    assert names(startable(queue, [make("r", "x")], slots=3, limits=limits)) == "cd"
    assert names(startable(queue, [], slots=1, limits=limits)) == "a"
    assert startable(queue, [make("q"), make("s")], slots=2, limits=limits) == []


def test_starts_are_guessed_from_what_is_left_of_the_jobs_before(make: Any) -> None:
    """Two slots; r ends in 100 s, s in 40 s. a takes 30 s, b and c the typical 50 s."""
    running = [make("r", eta_s=100.0), make("s", eta_s=40.0)]
    queue = [make("a", eta_s=30.0), make("b"), make("c")]
    found = places(queue, running, slots=2, limits={}, typical_s=50.0)
    assert found == {"ftjob-a": Place(1, 40.0), "ftjob-b": Place(2, 70.0), "ftjob-c": Place(3, 100.0)}


def test_the_limit_of_a_tenant_delays_its_own_jobs_alone(make: Any) -> None:
    """One of x at a time: its second waits for its first, and y goes before it."""
    queue = [make("a", "x"), make("b", "x"), make("c", "y")]
    found = places(queue, [], slots=2, limits={"x": 1}, typical_s=60.0)
    assert found == {"ftjob-a": Place(1, 0.0), "ftjob-c": Place(2, 0.0), "ftjob-b": Place(3, 60.0)}
    assert places(queue[:1], [], slots=2, limits={"x": 0}, typical_s=60.0) == {}


def test_the_typical_length_is_that_of_jobs_that_ended(store: Store, helpers: Any, clock: Any) -> None:
    for name, seconds in (("one", 100), ("two", 300)):
        _, bearer = helpers.start(store, f"ftjob-{name}")
        store.drivers.transition(bearer, "running")
        clock.advance(seconds)
        store.drivers.transition(bearer, "succeeded")
    helpers.start(store, "ftjob-three")
    waiting = helpers.queue(store, "ftjob-four")
    assert store.jobs.places(slots=1)[waiting.id] == Place(1, 200.0)


async def test_priority_and_limit_of_a_tenant_decide_who_starts(
    store: Store, home: Any, launcher: Any, validator: Any, helpers: Any
) -> None:
    store.keys.create("their key", tenant_id="urgent")
    store.tenants.change("urgent", priority=5, max_running_jobs=1)
    helpers.submit(store, "ftjob-early")
    helpers.submit(store, "ftjob-u1", tenant_id="urgent")
    helpers.submit(store, "ftjob-u2", tenant_id="urgent")
    settings = ReconcilerSettings(max_running_jobs=2, status_every_s=0)
    reconciler = Reconciler(store, home, launcher, validator, url="http://x", settings=settings)
    for _ in range(5):
        await reconciler.reconcile()
        while tasks := list(reconciler._tasks.values()):
            await asyncio.wait(tasks)
    states = {name: store.jobs.get(f"ftjob-{name}").state for name in ("early", "u1", "u2")}
    assert states == {"early": "starting", "u1": "starting", "u2": "queued"}
