"""Who is next and when, by hand; and the reconciler that goes by it."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeseek_ray.jobs import queue_store
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


class Line(NamedTuple):
    """A job, as far as the queue looks."""

    id: str
    tenant_id: str
    eta_s: float | None


def by_the_rule(queue: list[Line], attended: list[Line], slots: int, limits: Any) -> dict[str, Place]:
    """The rule as one says it: at each moment the first in line that may start does; else time passes."""
    running = [(60.0 if job.eta_s is None else job.eta_s, job.tenant_id) for job in attended]
    waiting, found, now_s = list(queue), {}, 0.0
    while waiting:
        for job in waiting:
            limit = limits.get(job.tenant_id)
            of_tenant = sum(tenant == job.tenant_id for _, tenant in running)
            if len(running) < slots and (limit is None or of_tenant < limit):
                waiting.remove(job)
                running.append((now_s + (60.0 if job.eta_s is None else job.eta_s), job.tenant_id))
                found[job.id] = Place(len(found) + 1, now_s)
                break
        else:
            if not running:
                break
            now_s, _ = first = min(running)
            running.remove(first)
    return found


LINES = st.lists(
    st.tuples(st.sampled_from("xyz"), st.sampled_from([None, 0.0, 5.0, 60.0, 61.5])), max_size=12
)


@given(
    queue=LINES,
    attended=LINES.map(lambda jobs: jobs[:5]),
    slots=st.integers(0, 4),
    limits=st.dictionaries(st.sampled_from("xyz"), st.one_of(st.none(), st.integers(0, 3))),
)
def test_places_are_those_of_the_rule(queue: Any, attended: Any, slots: int, limits: Any) -> None:
    waiting = [Line(f"q{i}", *job) for i, job in enumerate(queue)]
    running = [Line(f"r{i}", *job) for i, job in enumerate(attended)]
    found = places(waiting, running, slots=slots, limits=limits, typical_s=60.0)
    assert found == by_the_rule(waiting, running, slots, limits)


def test_places_of_a_long_queue_cost_each_job_the_same() -> None:
    """Every poll of a queued job asks for them; by the rule's own words the cost grows with the square."""

    def seconds_for(count: int) -> float:
        queue = [Line(str(i), f"t{i % 50}", 1.0) for i in range(count)]
        started = time.process_time()
        found = places(queue, [], slots=8, limits={f"t{i}": i % 3 for i in range(50)})
        assert len(found) == count - count // 50 * 17  # of every third tenant none may run
        return time.process_time() - started

    assert seconds_for(40_000) < 40 * min(seconds_for(4_000) for _ in range(3))  # the square would be 100


def test_places_are_kept_until_something_is_written(
    store: Store, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = store.queue._find_places
    monkeypatch.setattr(store.queue, "_find_places", lambda slots: looks.append(slots) or look(slots))
    first = helpers.queue(store, "ftjob-first")
    for _ in range(3):
        assert store.queue.places(slots=1) == {first.id: Place(1, 0.0)}
    assert store.queue.places(slots=2) and looks == [1, 2]
    second = helpers.queue(store, "ftjob-second")
    assert list(store.queue.places(slots=1)) == [first.id, second.id]
    store.jobs.cancel(first.id)
    assert list(store.queue.places(slots=1)) == [second.id]


def test_one_look_for_places_serves_all_who_ask_meanwhile(
    store: Store, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = helpers.queue(store, "ftjob-first")
    looks, asked = [], threading.Barrier(4)
    look = store.queue._find_places

    def long_look(slots: int) -> dict[str, Place]:
        looks.append(slots)
        time.sleep(0.2)  # the others have asked by then
        return look(slots)

    monkeypatch.setattr(store.queue, "_find_places", long_look)

    def ask(_: int) -> dict[str, Place]:
        asked.wait(30)
        return store.queue.places(slots=1)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == 4 * [{first.id: Place(1, 0.0)}]
    assert looks == [1]


def test_places_of_a_long_queue_are_good_for_a_moment(
    store: Store, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that takes 0.1 s of a core is not repeated within two seconds."""
    clock = SimpleNamespace(now=0.0, worked=0.0)
    clock.monotonic, clock.thread_time = lambda: clock.now, lambda: clock.worked
    monkeypatch.setattr(queue_store, "time", clock)
    monkeypatch.setattr(queue_store, "_LONG", 1)
    look = store.queue._find_places

    def long_look(slots: int) -> dict[str, Place]:
        clock.worked += 0.1
        return look(slots)

    monkeypatch.setattr(store.queue, "_find_places", long_look)
    first = helpers.queue(store, "ftjob-first")
    assert list(store.queue.places(slots=1)) == [first.id]
    second = helpers.queue(store, "ftjob-second")
    clock.now = 1.9
    assert list(store.queue.places(slots=1)) == [first.id]
    clock.now = 2.1
    assert list(store.queue.places(slots=1)) == [first.id, second.id]


def test_the_typical_length_is_that_of_jobs_that_ended(store: Store, helpers: Any, clock: Any) -> None:
    for name, seconds in (("one", 100), ("two", 300)):
        _, bearer = helpers.start(store, f"ftjob-{name}")
        store.drivers.transition(bearer, "running")
        clock.advance(seconds)
        store.drivers.transition(bearer, "succeeded")
    helpers.start(store, "ftjob-three")
    waiting = helpers.queue(store, "ftjob-four")
    assert store.queue.places(slots=1)[waiting.id] == Place(1, 200.0)


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
