"""A pass of the reconciler looks at what there is to do, on both databases; not at all that waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from modeseek_ray.jobs.agenda import Agenda
from modeseek_ray.jobs.records import EventDraft, JobRecord
from modeseek_ray.jobs.store import Store


@pytest.fixture
def either(either_url: str, clock: Any) -> Iterator[Store]:
    store = Store(either_url, clock=clock)
    yield store
    store.close()


def names(found: list[JobRecord]) -> list[str]:
    return [job.id.removeprefix("ftjob-") for job in found]


def test_each_job_is_where_something_has_to_be_done_about_it(either: Store, helpers: Any) -> None:
    store = either
    helpers.submit(store, "ftjob-new")
    helpers.submit(store, "ftjob-newer")
    store.jobs.move(helpers.submit(store, "ftjob-checked"), "validating", EventDraft("validating"))
    started, _ = helpers.start(store, "ftjob-runs")
    lost, _ = helpers.start(store, "ftjob-lost")
    store.attempts.lose(lost, "it fell")
    cancelled, _ = helpers.start(store, "ftjob-ends")
    store.jobs.cancel(cancelled.id)
    store.jobs.pause("ftjob-checked")  # it is queued first, for its validation has begun
    store.jobs.move(store.jobs.get("ftjob-checked"), "queued", EventDraft("queued"))
    store.jobs.cancel(helpers.queue(store, "ftjob-gone").id)
    store.jobs.pause(helpers.queue(store, "ftjob-rests").id)
    helpers.queue(store, "ftjob-first")
    helpers.queue(store, "ftjob-second")
    agenda = store.agenda(validations=1, slots=3)  # two of them are taken
    lists = [name for name in Agenda.__dataclass_fields__ if name != "attempts"]
    assert {name: names(getattr(agenda, name)) for name in lists} == {
        "coming": ["new"],
        "attended": ["runs", "ends"],
        "recovering": ["lost"],
        "to_pause": ["checked"],
        "to_start": ["first"],
    }
    assert names(store.agenda(validations=9, slots=9).coming) == ["new", "newer"]
    aside = {store.jobs.get("ftjob-first").number}
    assert names(store.agenda(validations=1, slots=3, aside=aside).to_start) == ["second"]
    assert store.agenda(validations=1, slots=2).to_start == []
    assert agenda.attended[0] == store.jobs.get(started.id)
    assert agenda.attempts == {job: store.attempts.get(job, 1) for job in (started.id, cancelled.id)}


def test_the_line_goes_by_priority_and_past_tenants_at_their_limit(either: Store, helpers: Any) -> None:
    store = either
    store.keys.create("a key", tenant_id="many")
    store.keys.create("a key", tenant_id="urgent")
    store.tenants.change("many", max_running_jobs=1)
    store.tenants.change("urgent", priority=5, max_running_jobs=0)
    for i in range(3):
        helpers.submit(store, f"ftjob-m{i}", tenant_id="many")
    helpers.submit(store, "ftjob-own")
    helpers.submit(store, "ftjob-u", tenant_id="urgent")
    for job in store.jobs.in_states("accepted"):
        store.jobs.move(
            store.jobs.move(job, "validating", EventDraft("validating")), "queued", EventDraft("queued")
        )
    assert names(store.agenda(validations=1, slots=3).to_start) == ["m0", "own"]
    store.tenants.change("urgent", max_running_jobs=1)
    assert names(store.agenda(validations=1, slots=3).to_start) == ["u", "m0", "own"]


def test_a_pass_costs_the_same_however_many_wait(store: Store, helpers: Any) -> None:
    """No job of the line is read but those that start, and the line itself is an index, read in its order."""
    helpers.queue(store, "ftjob-first")
    plans: list[str] = []

    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "desired" in statement.partition("WHERE")[2] and "run" in parameters:
            rows = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend(row[-1] for row in rows)

    event.listen(store.database._reader, "before_cursor_execute", explain)
    assert len(store.agenda(validations=1, slots=2).to_start) == 1
    assert len(plans) == 1 and "USING COVERING INDEX jobs_in_line" in plans[0], plans


def test_jobs_that_wait_are_not_read(store: Store, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        helpers.queue(store, f"ftjob-{i}")
        helpers.submit(store, f"ftjob-new-{i}")
    read: list[str] = []
    of = JobRecord.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(JobRecord, "of", classmethod(lambda cls, row: read.append(row.id) or of(cls, row)))
    store.agenda(validations=2, slots=1)
    assert read == ["ftjob-new-0", "ftjob-new-1", "ftjob-0"]
