"""`/v1/fine_tuning/validations`: looking before training, which takes too long for one request.

Started by `POST /v1/fine_tuning/jobs/validate?score=true`. Outcomes are kept in this process alone:
after a restart of the service they are gone, and cost one request to have again (scores are cached).
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass, replace
from typing import Literal

from fastapi import APIRouter

from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.launcher import ValidationOutcome, Validator
from modeseek_ray.jobs.paths import Home
from modeseek_ray.service.context import CallerDep, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.service.wire import JobError, Validation, ValidationObject

router = APIRouter(prefix="/v1/fine_tuning/validations", tags=["jobs"], responses=ERROR_RESPONSES)

KEPT = 64  # finished ones, newest
WAITING = 8  # of one tenant, the running one included


@dataclass(frozen=True)
class Running:
    """One validation, from its request to its outcome."""

    id: str
    tenant_id: str
    created_at: float
    status: Literal["queued", "running", "finished"] = "queued"
    outcome: ValidationOutcome | None = None


class Validations:
    """Runs them one after another: each loads a model."""

    def __init__(self, home: Home, validator: Validator) -> None:
        self._home = home
        self._validator = validator
        self._known: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def refuse_crowds(self, tenant_id: str) -> None:
        """Raises `RequestError` where this tenant has too many under way."""
        waiting = [r for r in self._known.values() if r.tenant_id == tenant_id and r.status != "finished"]
        if len(waiting) >= WAITING:
            raise RequestError(
                f"{len(waiting)} validations with scores are under way.",
                mend="Wait for one of them to finish.",
            )

    def start(self, validation_id: str, tenant_id: str) -> ValidationObject:
        """Take over the directory of `validation_id`, which holds its specification."""
        self._known[validation_id] = Running(validation_id, tenant_id, time.time())
        task = asyncio.create_task(self._run(validation_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self.get(validation_id, tenant_id)

    def get(self, validation_id: str, tenant_id: str) -> ValidationObject:
        """As it is now. Raises `NotFoundError`."""
        known = self._known.get(validation_id)
        if known is None or known.tenant_id != tenant_id:
            raise NotFoundError(
                f"there is no validation {validation_id[:128]!r}.",
                mend="They are kept until the service restarts; send the request again.",
            )
        return _object(known)

    async def close(self) -> None:
        """End what runs, with its process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, validation_id: str) -> None:
        try:
            async with self._turn:
                self._change(validation_id, status="running")
                outcome = await self._validator.validate(validation_id, score=True)
        except Exception as error:  # whoever polls must not wait for ever
            message = f"the validation could not be run: {error!r}."
            outcome = ValidationOutcome(
                False, {"code": "validation_failed", "message": message, "param": None}
            )
        finally:
            await asyncio.to_thread(shutil.rmtree, self._home.job(validation_id), ignore_errors=True)
        self._change(validation_id, status="finished", outcome=outcome)
        finished = [key for key, known in self._known.items() if known.status == "finished"]
        for old in finished[:-KEPT]:
            del self._known[old]

    def _change(self, validation_id: str, **changes: object) -> None:
        self._known[validation_id] = replace(self._known[validation_id], **changes)  # type: ignore[arg-type]


@router.get("/{validation_id}")
async def retrieve_validation(validation_id: str, service: ServiceDep, caller: CallerDep) -> ValidationObject:
    """A validation with scores: its status, and its result once that is `finished`."""
    if service.validations is None:
        raise NotFoundError("this service validates nothing.", mend="Start it with `modeseek serve`.")
    return service.validations.get(validation_id, caller.tenant_id)


def validation_of(outcome: ValidationOutcome) -> Validation:
    """The outcome as the wire shows it."""
    error = None if outcome.error is None else JobError(**outcome.error)
    return Validation(valid=outcome.ok, error=error, report=dict(outcome.report))


def _object(known: Running) -> ValidationObject:
    return ValidationObject(
        id=known.id,
        created_at=int(known.created_at),
        status=known.status,
        url=f"{router.prefix}/{known.id}",
        result=None if known.outcome is None else validation_of(known.outcome),
    )
