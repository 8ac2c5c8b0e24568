"""Jobs in the store: accepted once, listed, moved, cancelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Text, cast, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import IdempotencyError, IllegalTransitionError, NotFoundError
from modeseek_ray.jobs.history import append_events, find_job, move_job
from modeseek_ray.jobs.records import (
    DEFAULT_TENANT,
    CheckpointRecord,
    EventDraft,
    Inheritance,
    JobRecord,
    Page,
    new_id,
)
from modeseek_ray.jobs.states import TERMINAL, TRANSITIONS
from modeseek_ray.jobs.tables import checkpoints, idempotency, jobs, tenants, to_json_text

# Nothing runs for these, so a cancelled one needs nobody to end it.
_UNATTENDED = frozenset({"accepted", "validating", "queued", "paused", "recovering"})
# A driver runs, or is about to: it hears of a pause with its next heartbeat.
_RUNS = frozenset({"starting", "running", "checkpointing"})
# On the way into the queue.
_COMING = frozenset({"accepted", "validating", "recovering"})


class JobStore:
    """What the API and the reconciler do with jobs. Thread-safe; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(
        self,
        job_id: str,
        config: Mapping[str, Any],
        *,
        tenant_id: str = DEFAULT_TENANT,
        file_ids: Sequence[str] = (),
        idempotency_key: str | None = None,
        body_sha256: str = "",
    ) -> tuple[JobRecord, bool]:
        """Accept a job; on disk on return. Returns it and whether it is new.

        The same `idempotency_key` returns the job of the first call, or raises `IdempotencyError`
        when the body differs.
        """
        try:
            with self._database.write() as connection:
                if idempotency_key is not None:
                    known = self._by_key(connection, tenant_id, idempotency_key, body_sha256)
                    if known is not None:
                        return known, False
                job = self._insert(connection, job_id, config, tenant_id, file_ids)
                if idempotency_key is not None:
                    connection.execute(
                        insert(idempotency).values(
                            tenant_id=tenant_id,
                            key=idempotency_key,
                            body_sha256=body_sha256,
                            job_id=job_id,
                            created_at=job.created_at,
                        )
                    )
        except IntegrityError:
            # On PostgreSQL two first uses of a key may overlap; the later one finds the other's job.
            with self._database.read() as connection:
                known = self._by_key(connection, tenant_id, idempotency_key or "", body_sha256)
            if known is None:
                raise
            return known, False
        self._database.announce(job_id)
        return job, True

    def succeed(
        self,
        failed: JobRecord,
        job_id: str,
        inherited: Inheritance | None,
        *,
        config: Mapping[str, Any] | None = None,
        note: EventDraft | None = None,
    ) -> tuple[JobRecord, bool]:
        """Accept a job that goes on where `failed` ended. Returns it and whether it is new.

        One successor lives at a time: while it does, it is returned again. `config` where it is not that of
        `failed`; `note` is what there is to say about that.
        """
        with self._database.write() as connection:
            find_job(connection, failed.id, lock=True)
            known = connection.execute(
                select(jobs.c.id).where(jobs.c.resumed_from == failed.id, jobs.c.state.not_in(TERMINAL))
            ).scalar()
            if known is not None:
                return find_job(connection, known), False
            self._insert(connection, job_id, config or failed.config, failed.tenant_id, failed.file_ids)
            step = None if inherited is None else inherited.step
            values = {"resumed_from": failed.id, "committed_step": step, "step": step or 0}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
            if inherited is not None:
                connection.execute(
                    insert(checkpoints).values(
                        id=new_id("ftckpt"),
                        job_id=job_id,
                        attempt=0,
                        step=inherited.step,
                        path=str(inherited.path),
                        model=inherited.model,
                        metrics=dict(inherited.metrics),
                        created_at=self._database.clock(),
                    )
                )
            event = EventDraft(
                f"It goes on where {failed.id} ended, at step {step or 0}.",
                data={"resumed_from": failed.id, "step": step or 0},
            )
            append_events(connection, job_id, [event, *filter(None, [note])], self._database.clock())
            job = find_job(connection, job_id)
        self._database.announce(job_id)
        return job, True

    def find_idempotent(self, tenant_id: str, key: str, body_sha256: str) -> JobRecord | None:
        """The job an earlier request with this key made. Raises `IdempotencyError` for another body."""
        with self._database.read() as connection:
            return self._by_key(connection, tenant_id, key, body_sha256)

    def get(self, job_id: str, tenant_id: str | None = None) -> JobRecord:
        """Raises `NotFoundError`, also for another tenant's job."""
        with self._database.read() as connection:
            return find_job(connection, job_id, tenant_id)

    def page(
        self,
        *,
        tenant_id: str | None = None,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[JobRecord]:
        """Newest first, older than job `after`, with all of `metadata`."""
        with self._database.read() as connection:
            query = select(jobs).order_by(jobs.c.number.desc())
            if tenant_id is not None:
                query = query.where(jobs.c.tenant_id == tenant_id)
            if after is not None:
                query = query.where(jobs.c.number < find_job(connection, after, tenant_id).number)
            for key, value in (metadata or {}).items():
                query = query.where(jobs.c.config["metadata"][key].as_string() == value)
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([JobRecord.of(row) for row in rows[:limit]], len(rows) > limit)

    def in_states(self, *states: str) -> list[JobRecord]:
        """All jobs in these states, first in line first."""
        query = select(jobs).where(jobs.c.state.in_(states)).order_by(jobs.c.priority.desc(), jobs.c.number)
        with self._database.read() as connection:
            return [JobRecord.of(row) for row in connection.execute(query)]

    def count_by_state(self) -> dict[str, int]:
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
            return {state: count for state, count in rows}

    def living_that_name(self, text: str) -> list[JobRecord]:
        """Jobs that have not ended and in whose configuration this stands, anywhere: look closely at those."""
        living = jobs.c.state.in_([state for state in TRANSITIONS if state not in TERMINAL])
        named = cast(jobs.c.config, Text).contains(to_json_text(text)[1:-1], autoescape=True)
        with self._database.read() as connection:
            return [JobRecord.of(row) for row in connection.execute(select(jobs).where(living, named))]

    def move(self, job: JobRecord, state: str, event: EventDraft, **changes: Any) -> JobRecord:
        """One transition from the state `job` was read in. Raises `ConflictError` if it has moved since."""
        with self._database.write() as connection:
            moved = move_job(connection, job, state, event, self._database.clock(), **changes)
        self._database.announce(job.id)
        return moved

    def cancel(self, job_id: str, tenant_id: str | None = None) -> JobRecord:
        """Ask for the job's end. Immediate when nothing runs for it; a second request changes nothing.

        Raises `IllegalTransitionError` for a job that has ended.
        """
        now = self._database.clock()
        with self._database.write() as connection:
            job = find_job(connection, job_id, tenant_id, lock=True)
            if job.state == "cancelling":
                return job
            asked = EventDraft("Cancellation was asked for.", data={"state": "cancelling"})
            before = job.state
            job = move_job(connection, job, "cancelling", asked, now, desired="cancel", cancel_at=now)
            if before in _UNATTENDED:
                done = EventDraft("The job was cancelled.", data={"state": "cancelled"})
                job = move_job(connection, job, "cancelled", done, now, fence=job.fence + 1)
        self._database.announce(job_id)
        return job

    def pause(self, job_id: str, tenant_id: str | None = None) -> JobRecord:
        """Ask for a pause. Immediate for a queued job; a second request changes nothing.

        A job that is being validated or recovered is paused where it would have been queued. Raises
        `IllegalTransitionError` for a job that has ended or is being cancelled.
        """
        now = self._database.clock()
        with self._database.write() as connection:
            job = find_job(connection, job_id, tenant_id, lock=True)
            if job.state == "paused" or (job.desired == "pause" and not job.terminal):
                return job
            asked = EventDraft("A pause was asked for.", data={"state": "pausing"})
            if job.state in _RUNS:
                job = move_job(connection, job, "pausing", asked, now, desired="pause")
            elif job.state == "queued":
                paused = EventDraft("The job is paused.", data={"state": "paused"})
                job = move_job(connection, job, "paused", paused, now, desired="pause")
            elif job.state in _COMING:
                job = self._want(connection, job, "pause", asked, now)
            else:
                raise _cannot(job, "paused")
        self._database.announce(job_id)
        return job

    def resume(
        self,
        job_id: str,
        tenant_id: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        note: EventDraft | None = None,
    ) -> JobRecord:
        """Let a paused job go on from its last checkpoint; it queues again in its old place.

        `config` where it goes on under another one, which only a paused job can; `note` is what there is to
        say about that. Raises `IllegalTransitionError` unless it is paused, or waits to be. (A failed job is
        resumed as a new one: `succeed`.)
        """
        now = self._database.clock()
        with self._database.write() as connection:
            job = find_job(connection, job_id, tenant_id, lock=True)
            if job.state == "paused":
                event = EventDraft("The job goes on from its last checkpoint.", data={"state": "queued"})
                changes: dict[str, Any] = {"desired": "run", "fruitless_attempts": 0}
                if config is not None:
                    changes["config"] = dict(config)
                job = move_job(connection, job, "queued", event, now, **changes)
                append_events(connection, job_id, list(filter(None, [note])), now)
            elif job.state in _COMING and job.desired == "pause" and config is None:
                event = EventDraft("The pause was called off.", data={"state": job.state})
                job = self._want(connection, job, "run", event, now)
            else:
                raise _cannot(job, "resumed")
        self._database.announce(job_id)
        return job

    def _want(
        self, connection: Connection, job: JobRecord, desired: str, event: EventDraft, now: float
    ) -> JobRecord:
        """Note what is desired of a job whose state does not change now: who moves it next will look."""
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(desired=desired))
        append_events(connection, job.id, [event], now)
        return find_job(connection, job.id)

    def checkpoints(
        self, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[CheckpointRecord]:
        """Newest step first."""
        live = select(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.deleted_at.is_(None))
        query = live.order_by(checkpoints.c.step.desc(), checkpoints.c.attempt.desc())
        with self._database.read() as connection:
            rows = [CheckpointRecord.of(row) for row in connection.execute(query)]
        if after is not None:
            ids = [row.id for row in rows]
            if after not in ids:
                raise NotFoundError(f"there is no checkpoint {after!r}.", mend="List the job's checkpoints.")
            rows = rows[ids.index(after) + 1 :]
        return Page(rows[:limit], len(rows) > limit)

    def _by_key(self, connection: Any, tenant_id: str, key: str, body_sha256: str) -> JobRecord | None:
        row = connection.execute(
            select(idempotency).where(idempotency.c.tenant_id == tenant_id, idempotency.c.key == key)
        ).one_or_none()
        if row is None:
            return None
        if row.body_sha256 != body_sha256:
            raise IdempotencyError(
                "this Idempotency-Key was used with another body.", mend="Take a new key for a new job."
            )
        return find_job(connection, row.job_id)

    def _insert(
        self, connection: Any, job_id: str, config: Mapping[str, Any], tenant_id: str, file_ids: Sequence[str]
    ) -> JobRecord:
        now = self._database.clock()
        priority = connection.execute(
            select(tenants.c.priority).where(tenants.c.id == tenant_id)
        ).scalar_one()
        connection.execute(
            insert(jobs).values(
                id=job_id,
                tenant_id=tenant_id,
                version=1,
                state="accepted",
                desired="run",
                priority=priority,
                config=dict(config),
                file_ids=list(file_ids),
                created_at=now,
                state_at=now,
                attempt=0,
                fence=0,
                fruitless_attempts=0,
                last_event=0,
                step=0,
                result_files=[],
            )
        )
        accepted = EventDraft(f"Created fine-tuning job: {job_id}", data={"state": "accepted"})
        append_events(connection, job_id, [accepted], now)
        return find_job(connection, job_id)


def _cannot(job: JobRecord, what: str) -> IllegalTransitionError:
    """Why a pause or a resumption is refused."""
    mend = "Terminal jobs never change." if job.terminal else "Look at its `state` first."
    if job.state == "pausing":
        mend = "It is still pausing; ask again when its status is `paused`."
    return IllegalTransitionError(f"job {job.id} is {job.state} and cannot be {what}.", mend=mend)


def new_job_id() -> str:
    """The id is chosen before the row exists, because the job's directory is written first."""
    return new_id("ftjob")
