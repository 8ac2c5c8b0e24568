"""Inference engines in the store: which are wanted, which live, where they answer.

    wanted -> launched -> ready -> stopping -> ended        any state -> ended

The API writes `wanted`, the keeper launches and stops, the engine itself says that it is ready and
that it has ended. An engine answers for one model directory; at most one that lives is wanted for each.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, func, insert, select, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import StaleFenceError, TokenError
from modeseek_ray.jobs.records import Record, new_id
from modeseek_ray.jobs.tables import engines

USEFUL = ("wanted", "launched", "ready")  # will answer, or does
LIVING = (*USEFUL, "stopping")
_TOUCH_S = 2.0  # requests that come faster than that are one use
_KEEP_ENDED = 50


@dataclass(frozen=True)
class EngineRecord(Record):
    """One inference engine. See `tables.engines`."""

    id: str
    model: str
    model_path: str
    state: str
    created_at: float
    used_at: float
    token_sha256: str | None
    submission_id: str | None
    cluster_status: str | None
    address: str | None
    active: int
    heartbeat_at: float | None
    lease_until: float
    stopping_at: float | None
    ended_at: float | None
    outcome: str | None
    error: dict[str, Any] | None


class EngineStore:
    """Each method is one transaction."""

    def __init__(self, database: Database, *, lease_s: float, start_lease_s: float) -> None:
        self._database = database
        self.lease_s = lease_s
        self._start_lease_s = start_lease_s

    def want(self, model: str, path: str) -> EngineRecord:
        """The engine that answers, or will answer, for this directory: a new one where there is none."""
        now = self._database.clock()
        with self._database.read() as connection:
            found = _useful(connection, path)
        if found is not None and now - found.used_at < _TOUCH_S:
            return found
        with self._database.write() as connection:
            found = _useful(connection, path)
            if found is None:
                connection.execute(
                    insert(engines).values(
                        id=new_id("engine"),
                        model=model,
                        model_path=path,
                        state="wanted",
                        created_at=now,
                        used_at=now,
                        active=0,
                        lease_until=now + self._start_lease_s,
                    )
                )
                found = _useful(connection, path)
                assert found is not None
            else:
                connection.execute(update(engines).where(engines.c.id == found.id).values(used_at=now))
            return found

    def look(self, engine: EngineRecord) -> EngineRecord | None:
        """How it is with an engine that somebody waits for, which counts as its use."""
        fresh = self.get(engine.id)
        if fresh is not None and self._database.clock() - fresh.used_at > _TOUCH_S:
            self._change(engine.id, USEFUL, used_at=self._database.clock())
        return fresh

    def get(self, engine_id: str) -> EngineRecord | None:
        with self._database.read() as connection:
            row = connection.execute(select(engines).where(engines.c.id == engine_id)).one_or_none()
        return None if row is None else EngineRecord.of(row)

    def living(self) -> list[EngineRecord]:
        """Oldest first."""
        query = select(engines).where(engines.c.state.in_(LIVING)).order_by(engines.c.created_at)
        with self._database.read() as connection:
            return [EngineRecord.of(row) for row in connection.execute(query)]

    def count_by_state(self) -> dict[str, int]:
        """Of those that live."""
        query = select(engines.c.state, func.count()).where(engines.c.state.in_(LIVING))
        with self._database.read() as connection:
            return {state: int(n) for state, n in connection.execute(query.group_by(engines.c.state))}

    def arm(self, engine_id: str, token: str) -> bool:
        """Before it is launched: the token it will speak with. False if nobody wants it any more."""
        now = self._database.clock()
        return self._change(
            engine_id,
            ("wanted",),
            state="launched",
            token_sha256=_digest(token),
            lease_until=now + self._start_lease_s,
        )

    def launched(self, engine_id: str, submission_id: str) -> None:
        self._change(engine_id, LIVING, submission_id=submission_id)

    def note_status(self, engine_id: str, status: str) -> None:
        """What the cluster says about the process."""
        self._change(engine_id, LIVING, cluster_status=status)

    def heartbeat(
        self, engine_id: str, token: str, *, address: str, ready: bool, active: int
    ) -> Literal["run", "stop"]:
        """Renew the lease. Raises `StaleFenceError` for an engine that is over, `TokenError` for none of ours."""
        now = self._database.clock()
        with self._database.write() as connection:
            record = self._authorized(connection, engine_id, token)
            changes: dict[str, Any] = {
                "address": address,
                "active": active,
                "heartbeat_at": now,
                "lease_until": now + self.lease_s,
                "cluster_status": "running",
            }
            if ready and record.state == "launched":
                changes["state"] = "ready"
            if active:
                changes["used_at"] = now
            connection.execute(update(engines).where(engines.c.id == engine_id).values(**changes))
        return "stop" if record.state == "stopping" else "run"

    def left(self, engine_id: str, token: str, outcome: str, error: Mapping[str, Any] | None = None) -> None:
        """The engine says that it ends. Raises `StaleFenceError`."""
        with self._database.write() as connection:
            self._authorized(connection, engine_id, token)
            self._end(connection, engine_id, outcome, error)

    def stop(self, engine_id: str) -> bool:
        """Ask for its end. False if that was done before, or it has ended."""
        return self._change(engine_id, USEFUL, state="stopping", stopping_at=self._database.clock())

    def stop_model(self, path: str) -> list[str]:
        """Ask for the end of every engine of a model directory. Returns their ids."""
        with self._database.read() as connection:
            query = select(engines.c.id).where(engines.c.model_path == path, engines.c.state.in_(USEFUL))
            ids = [str(found) for found in connection.execute(query).scalars()]
        return [engine_id for engine_id in ids if self.stop(engine_id)]

    def end(self, engine_id: str, outcome: str, error: Mapping[str, Any] | None = None) -> None:
        """It is gone, or counts as gone: from now on its token opens nothing."""
        with self._database.write() as connection:
            self._end(connection, engine_id, outcome, error)

    def _end(
        self, connection: Connection, engine_id: str, outcome: str, error: Mapping[str, Any] | None
    ) -> None:
        connection.execute(
            update(engines)
            .where(engines.c.id == engine_id, engines.c.state.in_(LIVING))
            .values(
                state="ended",
                ended_at=self._database.clock(),
                outcome=outcome[:2000],
                error=None if error is None else dict(error),
                active=0,
            )
        )
        ended = select(engines.c.id).where(engines.c.state == "ended").order_by(engines.c.ended_at.desc())
        old = list(connection.execute(ended.offset(_KEEP_ENDED)).scalars())
        if old:
            connection.execute(delete(engines).where(engines.c.id.in_(old)))

    def _change(self, engine_id: str, states: tuple[str, ...], **values: Any) -> bool:
        with self._database.write() as connection:
            changed = connection.execute(
                update(engines).where(engines.c.id == engine_id, engines.c.state.in_(states)).values(**values)
            )
            return changed.rowcount == 1

    def _authorized(self, connection: Connection, engine_id: str, token: str) -> EngineRecord:
        row = connection.execute(select(engines).where(engines.c.id == engine_id)).one_or_none()
        known = "" if row is None else EngineRecord.of(row).token_sha256 or ""
        if row is None or not hmac.compare_digest(known, _digest(token)):
            raise TokenError("this is no engine's token.", mend="Only inference engines ask here.")
        record = EngineRecord.of(row)
        if record.state not in LIVING:
            raise StaleFenceError("this engine is over.", mend="It must end itself.")
        return record


def _useful(connection: Connection, path: str) -> EngineRecord | None:
    query = (
        select(engines)
        .where(engines.c.model_path == path, engines.c.state.in_(USEFUL))
        .order_by(engines.c.created_at)
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else EngineRecord.of(row)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
