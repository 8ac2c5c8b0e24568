"""The store beside a plain model of it: random submissions, attempts, drivers and users, on both databases.

Hypothesis draws the histories. The model is a few dictionaries and the table of legal states; after each
step the job that was touched must be what the model says, with its history gapless, and at the end all of
them, read anew from a store that was closed and opened again. `make fuzz` draws more and longer ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from modeseek_ray.jobs.driver_store import Bearer, Progress
from modeseek_ray.jobs.errors import (
    ConflictError,
    IdempotencyError,
    IllegalTransitionError,
    NotFoundError,
    StaleFenceError,
    TokenError,
)
from modeseek_ray.jobs.records import EventDraft, JobRecord
from modeseek_ray.jobs.states import DRIVER_STATES, TERMINAL, TRANSITIONS, public_status
from modeseek_ray.jobs.store import Store
from tests.modeseek_ray.fuzzing import LONG

CONFIG = {"model": "m", "training_file": "f"}
UNATTENDED = {"accepted", "validating", "queued", "paused", "recovering"}
RUNS = {"starting", "running", "checkpointing"}
COMING = {"accepted", "validating", "recovering"}

pytestmark = pytest.mark.timeout(3600 if LONG else 300)


@dataclass
class Attempt:
    number: int
    fence: int
    token: str
    last_sequence: int = 0
    outcome: str | None = None


@dataclass
class Job:
    """What the store has to know about a job."""

    id: str
    tenant: str
    state: str = "accepted"
    desired: str = "run"
    version: int = 1
    fence: int = 0
    committed: int | None = None
    history: list[str] = field(default_factory=lambda: ["accepted"])  # a state, or what an event said
    attempts: list[Attempt] = field(default_factory=list)
    checkpoints: set[tuple[int, int]] = field(default_factory=set)  # (step, attempt)

    def move(self, state: str) -> None:
        self.state, self.version = state, self.version + 1
        self.history.append(state)


class StoreMachine(RuleBasedStateMachine):
    """One store for all examples: each has tenants of its own."""

    store: Store
    clock: Any
    reopen: Callable[[], Store]
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.mark = f"x{next(self.numbers)}"
        self.tenants = [f"{self.mark}-a", f"{self.mark}-b"]
        for tenant in self.tenants:
            self.store.keys.create("k", tenant_id=tenant)
        kinds = [f"fine_tuning.job.{status}" for status in ("succeeded", "failed", "cancelled")]
        self.hook = self.store.webhooks.create(self.tenants[0], "h", "https://example.org/", kinds)
        self.jobs: list[Job] = []
        self.keys: dict[tuple[str, str], tuple[str, Job]] = {}
        self.leases: dict[str, tuple[str, float]] = {}
        self.old: list[JobRecord] = []  # as they were once read

    @initialize(depths=st.tuples(st.integers(0, 4), st.integers(3, 4)))
    def two_jobs(self, depths: tuple[int, int]) -> None:
        for tenant, depth in enumerate(depths):
            self.submit(tenant, "k", "a")
            self.advance(self.jobs[-1], depth)

    @rule(data=st.data(), pauses=st.booleans(), steps=st.integers(1, 5))
    def go_on(self, data: Any, pauses: bool, steps: int) -> None:
        """Along the usual course, so that most jobs come to run before something happens to them."""
        job = self.any_job(data)
        if pauses and job.state in RUNS | {"queued"} and job.desired == "run":
            self.store.jobs.pause(job.id)
            job.desired = "pause"
            job.move("pausing" if job.state in RUNS else "paused")
        self.advance(job, steps)

    def advance(self, job: Job, steps: int) -> None:
        for _ in range(steps):
            onward = {"accepted": "validating", "validating": "queued", "recovering": "queued"}.get(job.state)
            if onward is not None:
                self.store.jobs.move(
                    self.store.jobs.get(job.id), onward, EventDraft(onward, data={"state": onward})
                )
                job.move(onward)
            elif job.state == "paused":
                self.store.jobs.resume(job.id)
                job.desired = "run"
                job.move("queued")
            elif job.state == "queued":
                self.start_attempt(job)
            elif job.state in ("starting", "checkpointing", "pausing"):
                attempt = job.attempts[-1]
                bearer = Bearer(job.id, attempt.number, attempt.fence, attempt.token)
                state = "paused" if job.state == "pausing" else "running"
                self.store.drivers.transition(bearer, state)
                job.move(state)
                attempt.outcome = state if state == "paused" else None
        self.compare(job)

    # What users do

    @rule(tenant=st.sampled_from([0, 1]), key=st.sampled_from([None, "k", "l"]), body=st.sampled_from("ab"))
    def another(self, tenant: int, key: str | None, body: str) -> None:
        self.submit(tenant, key, body)

    def submit(self, tenant: int, key: str | None, body: str) -> None:
        name, new = self.tenants[tenant], f"ftjob-{self.mark}-{len(self.jobs)}"
        known = self.keys.get((name, key)) if key else None
        if known is None and len(self.jobs) >= 4:  # few jobs, long histories
            return
        with expecting(IdempotencyError if known and known[0] != body else None):
            record, is_new = self.store.jobs.submit(
                new, CONFIG, tenant_id=name, idempotency_key=key, body_sha256=body
            )
            assert is_new == (known is None)
            assert record.id == (known[1].id if known else new)
            if known is None:
                self.jobs.append(Job(new, name))
                if key:
                    self.keys[name, key] = body, self.jobs[-1]

    @rule(data=st.data(), own=st.booleans())
    def cancel(self, data: Any, own: bool) -> None:
        job = self.any_job(data)
        refusal = NotFoundError if not own else IllegalTransitionError if job.state in TERMINAL else None
        with expecting(refusal):
            self.store.jobs.cancel(job.id, self.tenant_of(job, own))
            if job.state != "cancelling":
                before = job.state
                job.desired = "cancel"
                job.move("cancelling")
                if before in UNATTENDED:
                    job.fence += 1
                    job.move("cancelled")
        self.compare(job)

    @rule(data=st.data(), own=st.booleans())
    def pause(self, data: Any, own: bool) -> None:
        job = self.any_job(data)
        asked = job.state == "paused" or (job.desired == "pause" and job.state not in TERMINAL)
        possible = asked or job.state in RUNS | COMING | {"queued"}
        with expecting(NotFoundError if not own else None if possible else IllegalTransitionError):
            self.store.jobs.pause(job.id, self.tenant_of(job, own))
            if not asked:
                job.desired = "pause"
                if job.state in COMING:
                    job.history.append("pausing")
                else:
                    job.move("pausing" if job.state in RUNS else "paused")
        self.compare(job)

    @rule(data=st.data(), own=st.booleans())
    def resume(self, data: Any, own: bool) -> None:
        job = self.any_job(data)
        called_off = job.state in COMING and job.desired == "pause"
        possible = job.state == "paused" or called_off
        with expecting(NotFoundError if not own else None if possible else IllegalTransitionError):
            self.store.jobs.resume(job.id, self.tenant_of(job, own))
            job.desired = "run"
            if called_off:
                job.history.append(job.state)
            else:
                job.move("queued")
        self.compare(job)

    @rule(tenant=st.sampled_from([0, 1]), limit=st.integers(1, 4))
    def page_through(self, tenant: int, limit: int) -> None:
        """Newest first, each once, though jobs move between the pages."""
        expected = [job.id for job in reversed(self.jobs) if job.tenant == self.tenants[tenant]]
        found: list[str] = []
        while True:
            after = found[-1] if found else None
            page = self.store.jobs.page(tenant_id=self.tenants[tenant], after=after, limit=limit)
            found += [record.id for record in page.data]
            assert len(page.data) <= limit
            if not page.has_more:
                break
        assert found == expected

    @rule(data=st.data(), limit=st.integers(1, 5))
    def page_through_events(self, data: Any, limit: int) -> None:
        job = self.any_job(data)
        found: list[int] = []
        while True:
            page = self.store.events.page(job.id, before=found[-1] if found else None, limit=limit)
            found += [event.sequence for event in page.data]
            if not page.has_more:
                break
        assert found == list(range(len(job.history), 0, -1))

    # What the reconciler does

    @rule(data=st.data(), state=st.sampled_from(["validating", "queued", "queued", "rejected", "paused"]))
    def move(self, data: Any, state: str) -> None:
        """By the newest record, so that only the table of states decides."""
        job = self.any_job(data)
        with expecting(None if state in TRANSITIONS[job.state] else IllegalTransitionError):
            self.store.jobs.move(self.store.jobs.get(job.id), state, EventDraft(state, data={"state": state}))
            job.move(state)
        self.compare(job)

    @precondition(lambda self: self.old)
    @rule(data=st.data(), state=st.sampled_from(["validating", "queued", "starting", "cancelling"]))
    def move_by_what_was_once_read(self, data: Any, state: str) -> None:
        """Who comes too late is told so, and changes nothing."""
        record = data.draw(st.sampled_from(self.old))
        job = next(job for job in self.jobs if job.id == record.id)
        if state not in TRANSITIONS[record.state]:
            refusal: type[Exception] | None = IllegalTransitionError
        else:
            refusal = ConflictError if record.version != job.version else None
        with expecting(refusal):
            self.store.jobs.move(record, state, EventDraft(state, data={"state": state}))
            job.move(state)
        self.compare(job)

    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        job = self.any_job(data)
        with expecting(None if job.state == "queued" else IllegalTransitionError):
            self.start_attempt(job)
        self.compare(job)

    def start_attempt(self, job: Job) -> None:
        token = f"token-{len(job.attempts)}"
        self.store.attempts.begin(self.store.jobs.get(job.id), token)
        job.fence += 1
        job.attempts.append(Attempt(len(job.attempts) + 1, job.fence, token))
        job.move("starting")

    @precondition(lambda self: any(job.attempts for job in self.jobs))
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        job = self.any_job(data, lambda job: bool(job.attempts))
        with expecting(None if "recovering" in TRANSITIONS[job.state] else IllegalTransitionError):
            self.store.attempts.lose(self.store.jobs.get(job.id), "gone")
            job.fence += 1
            job.attempts[-1].outcome = "gone"
            job.move("recovering")
        self.compare(job)

    @precondition(lambda self: any(job.attempts for job in self.jobs))
    @rule(data=st.data(), state=st.sampled_from(["failed", "cancelled"]))
    def end(self, data: Any, state: str) -> None:
        job = self.any_job(data, lambda job: bool(job.attempts))
        event = EventDraft(state, data={"state": state})
        with expecting(None if state in TRANSITIONS[job.state] else IllegalTransitionError):
            self.store.attempts.end(self.store.jobs.get(job.id), state, event)
            job.fence += 1
            job.attempts[-1].outcome = state
            job.move(state)
        self.compare(job)

    @rule(name=st.sampled_from("rs"), holder=st.sampled_from("ABC"), passes_s=st.sampled_from([0, 5, 20]))
    def hold_lease(self, name: str, holder: str, passes_s: int) -> None:
        self.clock.advance(passes_s)
        held_by, until = self.leases.get(name, ("", 0.0))
        free = held_by == holder or until < self.clock()
        assert self.store.hold_lease(f"{self.mark}-{name}", holder, 15) == free
        if free:
            self.leases[name] = holder, self.clock() + 15

    # What drivers say, those of attempts that are over among them

    @precondition(lambda self: any(job.attempts for job in self.jobs))
    @rule(data=st.data(), step=st.integers(0, 9))
    def heartbeat(self, data: Any, step: int) -> None:
        job, attempt, bearer = self.any_driver(data)
        with expecting(self.refusal(job, attempt, bearer)):
            desired, until = self.store.drivers.heartbeat(bearer, Progress(step=step))
            assert (desired, until) == (job.desired, self.clock() + self.store.drivers.lease_s)
        self.compare(job)

    @precondition(lambda self: any(job.attempts for job in self.jobs))
    @rule(data=st.data(), numbers=st.lists(st.integers(1, 6), max_size=6))
    def driver_events(self, data: Any, numbers: list[int]) -> None:
        """Sent twice, out of order, with gaps: stored once, in order, up to the gap."""
        job, attempt, bearer = self.any_driver(data)
        drafts = [EventDraft(f"{attempt.number}.{n}", attempt_sequence=n) for n in numbers]
        with expecting(self.refusal(job, attempt, bearer)):
            acknowledged = self.store.drivers.append_events(bearer, drafts).acknowledged
            while attempt.last_sequence + 1 in numbers:
                attempt.last_sequence += 1
                job.history.append(f"{attempt.number}.{attempt.last_sequence}")
            assert acknowledged == attempt.last_sequence
        self.compare(job)

    @precondition(lambda self: any(job.attempts for job in self.jobs))
    @rule(data=st.data(), step=st.integers(1, 4))
    def checkpoint(self, data: Any, step: int) -> None:
        job, attempt, bearer = self.any_driver(data)
        with expecting(self.refusal(job, attempt, bearer)):
            self.store.drivers.commit_checkpoint(bearer, step, Path(f"/{step}"), {}, "ft:m")
            job.checkpoints.add((step, attempt.number))
            job.committed = max(step, job.committed or 0)
        self.compare(job)

    @precondition(lambda self: any(job.attempts for job in self.jobs))
    @rule(data=st.data(), state=st.sampled_from([*sorted(DRIVER_STATES), "running", "running", "queued"]))
    def driver_moves(self, data: Any, state: str) -> None:
        job, attempt, bearer = self.any_driver(data)
        refusal = self.refusal(job, attempt, bearer)
        its_last_word = (
            bearer.token == attempt.token
            and (bearer.fence, attempt.number) == (job.fence, len(job.attempts))
            and job.state == attempt.outcome == state
        )
        not_heard = job.state in ("pausing", "cancelling") and state in ("running", "checkpointing")
        stays = job.state == state or not_heard
        if state not in DRIVER_STATES:
            refusal = IllegalTransitionError
        elif its_last_word:
            refusal = None
        elif refusal is None and not stays and state not in TRANSITIONS[job.state]:
            refusal = IllegalTransitionError
        with expecting(refusal):
            self.store.drivers.transition(bearer, state)
            if not stays and not its_last_word:
                job.move(state)
                if state in TERMINAL or state == "paused":
                    attempt.outcome = state
        self.compare(job)

    # What must hold

    def compare(self, job: Job) -> None:
        record = self.store.jobs.get(job.id)
        self.old = [*self.old[-20:], record]
        seen = (record.state, record.desired, record.version, record.fence, record.attempt)
        assert seen == (job.state, job.desired, job.version, job.fence, len(job.attempts))
        assert (record.committed_step, record.last_event) == (job.committed, len(job.history))
        assert (record.finished_at is not None) == (job.state in TERMINAL)
        events = self.store.events.after(job.id, 0, limit=10_000)
        assert [event.sequence for event in events] == list(range(1, len(job.history) + 1))
        assert [event.data.get("state", event.message) for event in events] == job.history
        kept = [(c.step, c.attempt) for c in self.store.jobs.checkpoints(job.id, limit=1000).data]
        assert kept == sorted(job.checkpoints, reverse=True)

    def teardown(self) -> None:
        """All of it again, from the disk; the outbox holds each end once; then out of the others' way."""
        type(self).store = self.reopen()
        for job in self.jobs:
            self.compare(job)
        ends = [j for j in self.jobs if j.tenant == self.tenants[0] and j.state in TERMINAL]
        told = [(d.job_id, d.event_type) for d in self.store.webhooks.deliveries(self.hook.id)]
        expected = [(j.id, f"fine_tuning.job.{public_status(j.state, j.committed)}") for j in ends]
        assert sorted(told) == sorted(expected)
        for job in self.jobs:
            if job.state not in TERMINAL | {"cancelling"}:
                self.store.jobs.cancel(job.id)

    def any_job(self, data: Any, fits: Callable[[Job], bool] = lambda _: True) -> Job:
        job: Job = data.draw(st.sampled_from([job for job in self.jobs if fits(job)]))
        return job

    def any_driver(self, data: Any) -> tuple[Job, Attempt, Bearer]:
        """Of any attempt, mostly the newest; once in a while with a wrong token or fence."""
        job = self.any_job(data, lambda job: bool(job.attempts))
        attempt = data.draw(st.sampled_from([*job.attempts, *job.attempts[-1:] * 3]))
        fence = attempt.fence + data.draw(st.sampled_from([0, 0, 0, 0, 1]))
        token = data.draw(st.sampled_from([attempt.token] * 6 + ["guess"]))
        return job, attempt, Bearer(job.id, attempt.number, fence, token)

    def refusal(self, job: Job, attempt: Attempt, bearer: Bearer) -> type[Exception] | None:
        if bearer.token != attempt.token:
            return TokenError
        is_its = (bearer.fence, attempt.number) == (job.fence, len(job.attempts))
        lives = job.state not in TERMINAL and attempt.outcome is None
        return None if is_its and lives else StaleFenceError

    def tenant_of(self, job: Job, own: bool) -> str:
        return next(tenant for tenant in self.tenants if (tenant == job.tenant) == own)


@contextmanager
def expecting(refusal: type[Exception] | None) -> Iterator[None]:
    """The call is refused with exactly this, and the rest of the block is not run; or it is carried out."""
    if refusal is None:
        yield
    else:
        with pytest.raises(refusal):
            yield


def test_the_store_does_what_a_plain_model_of_it_does(either_url: str, clock: Any) -> None:
    store = Store(either_url, clock=clock)
    shared = store.database.is_shared

    def reopen() -> Store:
        Machine.store.close()
        return Store(either_url, clock=clock)

    class Machine(StoreMachine):
        pass

    Machine.store, Machine.clock, Machine.reopen = store, clock, staticmethod(reopen)  # type: ignore[method-assign]
    examples = 400 if LONG else 12 if shared else 24
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=100 if LONG else 50,
            deadline=None,
            derandomize=not LONG,
            phases=[Phase.generate, Phase.shrink] if LONG else [Phase.generate],  # shrinking takes minutes
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    Machine.store.close()
