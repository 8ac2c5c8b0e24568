"""What a driver may write: each call checks that it speaks for the attempt its job has now."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select, update

from modeseek_ray.jobs.attempt_store import (
    append_numbered,
    digest,
    find_attempt,
    lose_attempt,
    update_attempt,
)
from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import IllegalTransitionError, NotFoundError, StaleFenceError, TokenError
from modeseek_ray.jobs.history import find_job, move_job
from modeseek_ray.jobs.records import CheckpointRecord, EventDraft, JobRecord, Results, new_id
from modeseek_ray.jobs.states import DRIVER_STATES
from modeseek_ray.jobs.tables import checkpoints, files, jobs, models

# Reasons for the end of an attempt that came before anything was tried: it waits again, as often as need be.
WITHOUT_A_TRY = frozenset({"no_resources"})


@dataclass(frozen=True)
class Bearer:
    """Who a driver says it is: checked in the same transaction as every write it asks for."""

    job_id: str
    attempt: int
    fence: int
    token: str


@dataclass(frozen=True)
class Progress:
    """What a heartbeat carries. `deadline_s` counts from the first heartbeat of (section, step)."""

    step: int = 0
    total_steps: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    section: str | None = None
    deadline_s: float | None = None
    hyperparameters: Mapping[str, Any] | None = None


class Appended(NamedTuple):
    """What became of a batch of events."""

    acknowledged: int  # the newest of the driver's numbers that is stored
    desired: str
    fresh: Sequence[EventDraft]  # those that were not stored before


class DriverStore:
    """Each method is one transaction and raises `StaleFenceError` when another attempt has the job."""

    def __init__(self, database: Database, *, lease_s: float = 60.0) -> None:
        self._database = database
        self.lease_s = lease_s

    def authorize(self, bearer: Bearer, repeating: str | None = None) -> JobRecord:
        """The job this driver may speak for, or may repeat its last word about."""
        with self._database.read() as connection:
            return _check(connection, bearer, repeating, lock=False)

    def heartbeat(self, bearer: Bearer, progress: Progress) -> tuple[str, float]:
        """Renew the lease and note progress. Returns what is desired and until when the lease holds."""
        now = self._database.clock()
        lease_until = now + self.lease_s
        values: dict[str, Any] = {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "tokens_per_s": progress.tokens_per_s,
            "eta_s": progress.eta_s,
            "section": progress.section,
        }
        if progress.hyperparameters is not None:
            values["hyperparameters"] = dict(progress.hyperparameters)
        with self._database.write() as connection:
            job = _check(connection, bearer)
            if progress.deadline_s is None:
                values["section_until"] = None
            elif job.section_until is None or (job.section, job.step) != (progress.section, progress.step):
                values["section_until"] = now + progress.deadline_s
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
            update_attempt(connection, job.id, bearer.attempt, heartbeat_at=now, lease_until=lease_until)
        return job.desired, lease_until

    def append_events(self, bearer: Bearer, drafts: Sequence[EventDraft]) -> Appended:
        """Store the driver's events, numbered 1, 2, 3 ... by itself; those known already are passed over.

        A gap in the numbers ends the batch: the driver sends again from the acknowledged number on.
        """
        now = self._database.clock()
        with self._database.write() as connection:
            job = _check(connection, bearer)
            newest, fresh = append_numbered(connection, job.id, bearer.attempt, drafts, now)
        if fresh:
            self._database.announce(job.id)
        return Appended(newest, job.desired, fresh)

    def commit_checkpoint(
        self, bearer: Bearer, step: int, path: Path, metrics: Mapping[str, Any], model: str
    ) -> CheckpointRecord:
        """Make a checkpoint that is complete on disk the one to resume from. Sent twice, it stays one."""
        now = self._database.clock()
        with self._database.write() as connection:
            job = _check(connection, bearer)
            known = select(checkpoints).where(
                checkpoints.c.job_id == job.id,
                checkpoints.c.attempt == bearer.attempt,
                checkpoints.c.step == step,
            )
            row = connection.execute(known).one_or_none()
            if row is None:
                connection.execute(
                    insert(checkpoints).values(
                        id=new_id("ftckpt"),
                        job_id=job.id,
                        attempt=bearer.attempt,
                        step=step,
                        path=str(path),
                        model=model,
                        metrics=dict(metrics),
                        created_at=now,
                    )
                )
                committed = max(step, job.committed_step or 0)
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(committed_step=committed))
                row = connection.execute(known).one()
        self._database.announce(job.id)
        return CheckpointRecord.of(row)

    def prune_checkpoint(self, bearer: Bearer, path: Path) -> None:
        """The driver is about to delete this checkpoint's files: nobody may resume from them any more."""
        with self._database.write() as connection:
            _check(connection, bearer)
            connection.execute(
                update(checkpoints)
                .where(checkpoints.c.job_id == bearer.job_id, checkpoints.c.path == str(path))
                .values(deleted_at=self._database.clock())
            )

    def transition(
        self,
        bearer: Bearer,
        state: str,
        *,
        error: Mapping[str, Any] | None = None,
        results: Results | None = None,
        model_name: str | None = None,
    ) -> JobRecord:
        """Where the driver says its job is now. Repeating the last word is allowed: answers get lost.

        `paused` with an `error` is the driver's own wish: it cannot go on now, but later (a full disk).
        The job waits for the user to resume it.
        """
        if state not in DRIVER_STATES:
            raise IllegalTransitionError(
                f"a driver cannot put a job in state {state!r}.",
                mend=f"It may say {', '.join(sorted(DRIVER_STATES))}.",
            )
        now = self._database.clock()
        with self._database.write() as connection:
            job = _check(connection, bearer, repeating=state)
            if job.state == state or (job.state in _STOPPING and state in ("running", "checkpointing")):
                return job  # a driver that has not yet heard that it shall stop may go on to its next step
            changes: dict[str, Any] = {}
            if error is not None and state == "paused":
                job = _give_way(connection, job, error, now)
            elif error is not None:
                changes["error"] = dict(error)
            if results is not None:
                changes |= self._store_results(connection, job, results, model_name, now)
            event = EventDraft(
                _SENTENCES[state]
                if error is None
                else f"{_SENTENCES[state]} {error.get('message', '')}".rstrip(),
                level="info" if error is None else "error",
                data={
                    "state": state,
                    "attempt": bearer.attempt,
                    **({} if error is None else {"error": dict(error)}),
                },
                attempt=bearer.attempt,
            )
            job = move_job(connection, job, state, event, now, **changes)
            if job.terminal or state == "paused":
                update_attempt(connection, job.id, bearer.attempt, ended_at=now, outcome=state)
        self._database.announce(job.id)
        return job

    def give_up(self, bearer: Bearer, error: Mapping[str, Any]) -> JobRecord:
        """The driver cannot go on, and nothing says that another could not: its attempt is lost.

        It counts towards the attempts that got no further, unless the cluster had no room for it: then
        nothing was tried. The driver's fence is void on return.
        """
        reason = f"{error.get('code')}: {error.get('message')}"
        with self._database.write() as connection:
            job = _check(connection, bearer)
            counts = error.get("code") not in WITHOUT_A_TRY
            job = lose_attempt(connection, job, reason, self._database.clock(), counts=counts)
        self._database.announce(job.id)
        return job

    def _store_results(
        self, connection: Connection, job: JobRecord, results: Results, model_name: str | None, now: float
    ) -> dict[str, Any]:
        changes: dict[str, Any] = {"result_files": []}
        if results.hyperparameters is not None:
            changes["hyperparameters"] = dict(results.hyperparameters)
        if results.trained_tokens is not None:
            changes["trained_tokens"] = results.trained_tokens
        for path in results.result_files:
            file_id = new_id("file")
            connection.execute(
                insert(files).values(
                    id=file_id,
                    tenant_id=job.tenant_id,
                    filename=path.name,
                    purpose="fine-tune-results",
                    bytes=path.stat().st_size,
                    path=str(path),
                    owned=True,
                    job_id=job.id,
                    created_at=now,
                )
            )
            changes["result_files"].append(file_id)
        if results.fine_tuned_model_path is not None and model_name is not None:
            connection.execute(
                insert(models).values(
                    name=model_name,
                    tenant_id=job.tenant_id,
                    job_id=job.id,
                    path=str(results.fine_tuned_model_path),
                    created_at=now,
                )
            )
            changes["fine_tuned_model"] = model_name
        return changes


def _give_way(connection: Connection, job: JobRecord, error: Mapping[str, Any], now: float) -> JobRecord:
    """On the way to a pause that nobody has asked for: no attempt follows by itself."""
    if job.state == "pausing":
        return job
    event = EventDraft(
        f"The job pauses: {error.get('code')}.", level="warn", data={"state": "pausing"}, attempt=job.attempt
    )
    return move_job(connection, job, "pausing", event, now, desired="pause")


_STOPPING = frozenset({"pausing", "cancelling"})
_SENTENCES = {
    "running": "The job is running.",
    "checkpointing": "A checkpoint is being written.",
    "paused": "The job is paused.",
    "succeeded": "The job has successfully completed.",
    "failed": "The job failed.",
    "cancelled": "The job was cancelled.",
}


def _wrong_token() -> TokenError:
    return TokenError("the attempt's token is wrong.", mend="This driver must stop.")


def _check(
    connection: Connection, bearer: Bearer, repeating: str | None = None, *, lock: bool = True
) -> JobRecord:
    """The job, if this driver is the one it has. `repeating` lets a driver repeat its own last word.

    The job stays locked: an attempt that is lost meanwhile waits until this driver's write is whole.
    Until the token matches there is one answer: nobody learns which jobs and attempts there are.
    """
    try:
        job = find_job(connection, bearer.job_id, lock=lock)
        attempt = find_attempt(connection, bearer.job_id, bearer.attempt)
    except (NotFoundError, StaleFenceError):
        raise _wrong_token() from None
    if not hmac.compare_digest(attempt.token_sha256, digest(bearer.token)):
        raise _wrong_token()
    own_last_word = repeating is not None and job.state == repeating and attempt.outcome == repeating
    live = not job.terminal and attempt.ended_at is None
    if bearer.fence != job.fence or bearer.attempt != job.attempt or not (live or own_last_word):
        raise StaleFenceError(
            f"attempt {bearer.attempt} of {job.id} is over: the job is {job.state}, attempt {job.attempt}.",
            mend="This driver must stop.",
        )
    return job
