"""What the store promises: nothing answered is lost or doubled, history has no gaps, the end is the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from modeseek_ray.errors import StorageError
from modeseek_ray.jobs.driver_store import Bearer, Progress
from modeseek_ray.jobs.errors import (
    ConflictError,
    IdempotencyError,
    IllegalTransitionError,
    NotFoundError,
    StaleFenceError,
    TokenError,
)
from modeseek_ray.jobs.records import EventDraft, Results, event_id, event_sequence
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.tables import metadata


@pytest.fixture
def store_url(either_url: str) -> str:
    """Every test of this file runs on SQLite and on PostgreSQL."""
    return either_url


def sequences(store: Store, job_id: str) -> list[int]:
    return [event.sequence for event in store.events.after(job_id, 0, limit=10_000)]


def test_migrations_lead_to_the_schema_in_the_code(store: Store) -> None:
    """Alembic cannot read a descending index back from SQLite; that one is compared on PostgreSQL alone."""
    with store.database.write() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
        names = [change[1].name for change in found]
        assert found == [] or (not store.database.is_shared and names == ["jobs_in_line"] * 2), found


def test_opening_again_keeps_everything(store: Store, store_url: str, helpers: Any) -> None:
    job = helpers.submit(store)
    again = Store(store_url)
    assert again.jobs.get(job.id) == job
    again.close()


def test_what_is_committed_is_on_disk(store: Store) -> None:
    with store.database.write() as connection:
        if store.database.is_shared:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
            assert connection.exec_driver_sql("SHOW fsync").scalar() == "on"
        else:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_reader_cannot_write(store: Store) -> None:
    with (
        store.database.read() as connection,
        pytest.raises(sqlalchemy.exc.DBAPIError, match="read-?only"),
    ):
        connection.exec_driver_sql("DELETE FROM jobs")


def test_two_that_open_an_empty_store_at_once_both_get_the_whole_schema(postgres: Any) -> None:
    url = postgres()
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(url), range(4)))
    for store in stores:
        assert store.jobs.page().data == []
        store.close()


def test_a_database_that_is_not_there_is_said_without_its_password() -> None:
    with pytest.raises(StorageError, match="cannot be opened") as caught:
        Store("postgresql://me:secret@127.0.0.1:9/none")
    assert (caught.value.code, "secret" in str(caught.value)) == ("store_unreachable", False)
    for wrong in ("mysql://x/y", "not a url"):
        with pytest.raises(StorageError, match="neither SQLite nor PostgreSQL"):
            Store(wrong)


def test_a_checkpoint_and_the_loss_of_its_attempt_never_pass_each_other(store: Store, helpers: Any) -> None:
    """Either the checkpoint was committed and counts, or its driver is refused: at any moment, many times."""
    for i in range(12):
        job, bearer = helpers.start(store, f"ftjob-{i}")
        barrier = threading.Barrier(2)

        def commit(bearer: Bearer = bearer, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                store.drivers.commit_checkpoint(bearer, 4, Path("/c"), {}, "ft:c")
            except StaleFenceError:
                return False
            return True

        with ThreadPoolExecutor(1) as pool:
            committed = pool.submit(commit)
            barrier.wait()
            lost = store.attempts.lose(store.jobs.get(job.id), "gone")
            assert lost.fruitless_attempts == (0 if committed.result() else 1)
            assert lost.committed_step == (4 if committed.result() else None)


def test_a_lease_goes_to_one_of_many_that_ask_at_once(store: Store) -> None:
    barrier = threading.Barrier(8)

    def ask(i: int) -> bool:
        barrier.wait()
        return store.hold_lease("reconciler", f"holder-{i}", 15)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1


def test_one_of_many_writers_wins_a_transition(store: Store, helpers: Any) -> None:
    job = helpers.submit(store)
    barrier = threading.Barrier(8)

    def race(_: int) -> bool:
        barrier.wait()
        try:
            store.jobs.move(job, "validating", EventDraft("won"))
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(8))) == 1
    assert store.jobs.get(job.id).version == job.version + 1
    assert [e.message for e in store.events.after(job.id, 0)].count("won") == 1


def test_events_are_gapless_under_threads(store: Store, helpers: Any) -> None:
    job = helpers.submit(store)

    def add(i: int) -> None:
        store.events.add(job.id, EventDraft(f"event {i}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(100)))
    assert sequences(store, job.id) == list(range(1, 102))


def test_a_transition_and_its_event_are_one_commit(store: Store, helpers: Any) -> None:
    """The event cannot be stored, so the state does not change either."""
    job = helpers.submit(store)
    with pytest.raises((sqlalchemy.exc.StatementError, ValueError), match="Out of range float"):
        store.jobs.move(job, "validating", EventDraft("bad", data={"loss": float("nan")}))
    assert store.jobs.get(job.id) == job


def test_the_end_is_the_end(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    done = store.drivers.transition(bearer, "succeeded")
    history = sequences(store, job.id)
    attempts: list[Callable[[], Any]] = [
        lambda: store.jobs.cancel(job.id),
        lambda: store.jobs.move(done, "queued", EventDraft("again")),
        lambda: store.drivers.heartbeat(bearer, Progress(step=99)),
        lambda: store.drivers.append_events(bearer, [EventDraft("late", attempt_sequence=1)]),
        lambda: store.drivers.commit_checkpoint(bearer, 5, Path("/x"), {}, "ft:x"),
        lambda: store.drivers.transition(bearer, "failed"),
    ]
    for attempt in attempts:
        with pytest.raises((IllegalTransitionError, StaleFenceError)):
            attempt()
    store.events.add(job.id, EventDraft("late"))
    assert store.jobs.get(job.id) == done
    assert sequences(store, job.id) == history


def test_the_last_word_may_be_repeated_by_the_driver_that_said_it(store: Store, helpers: Any) -> None:
    _, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    done = store.drivers.transition(bearer, "succeeded", results=Results(trained_tokens=7))
    assert store.drivers.transition(bearer, "succeeded", results=Results(trained_tokens=7)) == done


def test_the_same_key_makes_one_job_even_at_once(store: Store, helpers: Any) -> None:
    def send(i: int) -> str:
        job, _ = store.jobs.submit(f"ftjob-{i}", helpers.config, idempotency_key="k", body_sha256="a")
        return job.id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(send, range(16)))) == 1
    assert len(store.jobs.page().data) == 1
    with pytest.raises(IdempotencyError):
        store.jobs.submit("ftjob-x", helpers.config, idempotency_key="k", body_sha256="b")


def test_a_stale_fence_or_a_wrong_token_is_refused(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    for unknown in (
        Bearer(job.id, 1, 1, "guess"),
        Bearer("none", 1, 1, "token"),
        Bearer(job.id, 2, 1, "token"),
    ):
        with pytest.raises(TokenError, match=r"^the attempt's token is wrong\. This driver must stop\.$"):
            store.drivers.heartbeat(unknown, Progress())
    store.attempts.lose(store.jobs.get(job.id), "gone")
    with pytest.raises(StaleFenceError):
        store.drivers.heartbeat(bearer, Progress())
    job = store.jobs.move(store.jobs.get(job.id), "queued", EventDraft("again"))
    job = store.attempts.begin(job, "second")
    assert (job.attempt, job.fence) == (2, 3)
    with pytest.raises(StaleFenceError):
        store.drivers.append_events(bearer, [EventDraft("old", attempt_sequence=1)])
    with pytest.raises(StaleFenceError):
        store.drivers.heartbeat(Bearer(job.id, 1, 3, "token"), Progress())
    with pytest.raises(StaleFenceError):
        store.drivers.give_up(bearer, {"code": "worker_died", "message": "rank 0"})
    with pytest.raises(StaleFenceError):
        store.drivers.heartbeat(Bearer(job.id, 2, 2, "second"), Progress())
    assert store.drivers.heartbeat(Bearer(job.id, 2, 3, "second"), Progress())[0] == "run"


def test_driver_events_are_stored_once_and_in_order(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    begun = store.jobs.get(job.id).last_event

    def send(*numbers: int) -> int:
        return store.drivers.append_events(
            bearer, [EventDraft(f"e{n}", attempt=1, attempt_sequence=n) for n in numbers]
        )[0]

    assert send(1, 2) == 2
    assert send(2, 3) == 3  # 2 was acknowledged, but the answer was lost
    assert send(5) == 3  # 4 is missing: not stored before it
    assert send(5, 4) == 5
    stored = store.events.after(job.id, begun)
    assert [e.message for e in stored] == ["e1", "e2", "e3", "e4", "e5"]


def test_a_checkpoint_sent_twice_is_one(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    for _ in range(2):
        store.drivers.commit_checkpoint(bearer, 4, Path("/c/4"), {"loss": 1.0}, "ft:c4")
    store.drivers.commit_checkpoint(bearer, 8, Path("/c/8"), {}, "ft:c8")
    assert [c.step for c in store.jobs.checkpoints(job.id).data] == [8, 4]
    assert store.jobs.get(job.id).committed_step == 8
    assert store.newest_checkpoints(job.id) == ["/c/8", "/c/4"]
    store.drivers.prune_checkpoint(bearer, Path("/c/8"))
    assert store.newest_checkpoints(job.id) == ["/c/4"]


def test_cancel_is_immediate_where_nothing_runs(store: Store, helpers: Any) -> None:
    job = helpers.queue(store)
    cancelled = store.jobs.cancel(job.id)
    assert (cancelled.state, cancelled.version) == ("cancelled", job.version + 2)
    with pytest.raises(IllegalTransitionError):
        store.jobs.cancel(job.id)


def test_cancel_of_a_running_job_asks_its_driver(store: Store, helpers: Any) -> None:
    job, bearer = helpers.start(store)
    store.drivers.transition(bearer, "running")
    assert store.jobs.cancel(job.id).state == "cancelling"
    assert store.jobs.cancel(job.id).state == "cancelling"  # asking again changes nothing
    assert store.drivers.heartbeat(bearer, Progress(step=3))[0] == "cancel"
    assert store.drivers.transition(bearer, "running").state == "cancelling"
    assert store.drivers.transition(bearer, "cancelled").state == "cancelled"


def test_queue_positions_follow_acceptance(store: Store, helpers: Any) -> None:
    queued = [helpers.queue(store, f"ftjob-{i}") for i in range(3)]
    places = store.queue.places(slots=1)
    assert [places[job.id].position for job in queued] == [1, 2, 3]
    store.jobs.cancel(queued[0].id)
    assert store.queue.places(slots=1)[queued[2].id].position == 2


def test_pages_meet_without_overlap(store: Store, helpers: Any) -> None:
    ids = [helpers.submit(store, f"ftjob-{i}").id for i in range(5)]
    first = store.jobs.page(limit=2)
    second = store.jobs.page(limit=2, after=first.data[-1].id)
    third = store.jobs.page(limit=2, after=second.data[-1].id)
    assert [job.id for page in (first, second, third) for job in page.data] == ids[::-1]
    assert (first.has_more, second.has_more, third.has_more) == (True, True, False)


def test_metadata_filters(store: Store, helpers: Any) -> None:
    helpers.submit(store)
    assert len(store.jobs.page(metadata={"team": "a"}).data) == 1
    assert store.jobs.page(metadata={"team": "b"}).data == []
    assert store.jobs.page(metadata={"te.am": "a"}).data == []


def test_living_jobs_that_name_something(store: Store, helpers: Any) -> None:
    for name, model in (("a", 'ft:so "called" 100%:default::1'), ("b", "ft:so called 1000:default::1")):
        store.jobs.submit(f"ftjob-{name}", {**helpers.config, "model": model})
    found = store.jobs.living_that_name('ft:so "called" 100%:default::1')
    assert [job.id for job in found] == ["ftjob-a"]
    assert len(store.jobs.living_that_name(helpers.config["training_file"])) == 2
    store.jobs.cancel("ftjob-a")
    assert store.jobs.living_that_name('ft:so "called" 100%:default::1') == []


def test_another_tenant_sees_nothing(store: Store, helpers: Any) -> None:
    store.keys.create("theirs", tenant_id="other")
    job = helpers.submit(store)
    file = store.files.add("file-a", "a", "fine-tune", Path("/a"), num_bytes=1, owned=True)
    with pytest.raises(NotFoundError):
        store.jobs.get(job.id, "other")
    with pytest.raises(NotFoundError):
        store.jobs.cancel(job.id, "other")
    with pytest.raises(NotFoundError):
        store.files.get(file.id, "other")
    assert store.jobs.page(tenant_id="other").data == []


def test_keys_are_verified_and_never_stored(store: Store) -> None:
    key, record = store.keys.create("mine")
    assert store.keys.verify(key) == record
    assert store.keys.verify(key[:-1] + ("0" if key[-1] != "0" else "1")) is None
    for wrong in ("", "sk-123", "msk__", key.replace("msk", "abc"), "msk_\ud800_x"):
        assert store.keys.verify(wrong) is None
    secret = key.rsplit("_", 1)[1]
    with store.database.read() as connection:
        stored = [
            str(tuple(row)) for table in metadata.sorted_tables for row in connection.execute(table.select())
        ]
    assert any(record.id in row for row in stored)
    assert not any(secret in row for row in stored)
    store.keys.revoke(record.id)
    assert store.keys.verify(key) is None
    assert store.keys.required()  # a service does not open when its last key goes
    assert (store.keys.remove_all(), store.keys.required()) == (1, False)


def test_one_holder_of_a_lease_at_a_time(store: Store, clock: Any) -> None:
    assert store.hold_lease("reconciler", "a", 15)
    assert not store.hold_lease("reconciler", "b", 15)
    clock.advance(10)
    assert store.hold_lease("reconciler", "a", 15)
    clock.advance(10)
    assert not store.hold_lease("reconciler", "b", 15)
    clock.advance(6)
    assert store.hold_lease("reconciler", "b", 15)


def test_event_ids_lead_back_to_their_place() -> None:
    assert event_sequence("ftjob-abc", event_id("ftjob-abc", 17)) == 17
    for wrong in ("ftevent-abd-17", "ftevent-abc-", "ftevent-abc-x", "17", "ftevent-abc-²"):
        assert event_sequence("ftjob-abc", wrong) is None


WRITER = """
import sys
from modeseek_ray.jobs.store import Store
store = Store(sys.argv[1])
for i in range(100_000):
    store.jobs.submit(f"ftjob-{i}", {"model": "m", "training_file": "f"})
    print(i, flush=True)
"""


def test_what_was_answered_survives_kill_9(store_url: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store_url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    answered = [writer.stdout.readline() for _ in range(40)]
    writer.kill()
    answered += writer.stdout.readlines()
    writer.wait()
    last = int([line for line in answered if line.endswith("\n")][-1])
    store = Store(store_url)
    stored = {job.id for job in store.jobs.in_states("accepted")}
    assert {f"ftjob-{i}" for i in range(last + 1)} <= stored
    assert all(sequences(store, job_id) == [1] for job_id in stored)
    store.close()
