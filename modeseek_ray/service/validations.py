"""`/v1/fine_tuning/validations`: looking before training, which takes too long for one request.

Started by `POST /v1/fine_tuning/jobs/validate?score=true`. Each has a directory of its own under the
service's home, and its state in there: after a restart of the service what was finished is still
listed, and what was not is done again (its scores are cached, so little is lost).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.launcher import ValidationOutcome, Validator
from modeseek_ray.jobs.paths import Home, write_private
from modeseek_ray.service.context import CallerDep, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.service.wire import JobError, Page, Validation, ValidationObject

router = APIRouter(prefix="/v1/fine_tuning/validations", tags=["jobs"], responses=ERROR_RESPONSES)

KEPT = 64  # finished ones of a tenant, newest
WAITING = 8  # of one tenant, the running one included
PREFIX = "check"  # of their ids


@dataclass(frozen=True)
class Record:
    """One validation, from its request to its outcome. The outcome is in its file alone: it may be long."""

    id: str
    tenant_id: str
    created_at: float
    status: Literal["queued", "running", "finished"] = "queued"

    @property
    def order(self) -> tuple[float, str]:
        return self.created_at, self.id


class Validations:
    """Runs them one after another: each loads a model."""

    def __init__(self, home: Home, validator: Validator) -> None:
        self._home = home
        self._validator = validator
        self._known: dict[str, Record] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def resume(self) -> None:
        """Take up what an earlier process of the service left: call once, before any request."""
        left = []
        for directory in self._home.jobs.glob(f"{PREFIX}-*"):
            try:
                data = json.loads(self._home.validation(directory.name).read_text(encoding="utf-8"))
                record = Record(**data["record"])
            except (OSError, ValueError, KeyError, TypeError):  # cut off before it was promised to anybody
                shutil.rmtree(directory, ignore_errors=True)
                continue
            self._known[record.id] = record
            if record.status != "finished":
                left.append(record)
        for record in sorted(left, key=lambda record: record.order):
            self._change(record.id, status="queued")
            self._begin(record.id)

    def refuse_crowds(self, tenant_id: str) -> None:
        """Raises `RequestError` where this tenant has too many under way."""
        waiting = [r for r in self._of(tenant_id) if r.status != "finished"]
        if len(waiting) >= WAITING:
            raise RequestError(
                f"{len(waiting)} validations with scores are under way.",
                mend="Wait for one of them to finish.",
            )

    def start(self, validation_id: str, tenant_id: str) -> ValidationObject:
        """Take over the directory of `validation_id`, which holds what to validate. On disk on return."""
        record = Record(validation_id, tenant_id, time.time())
        self._write(record)
        self._known[validation_id] = record
        self._begin(validation_id)
        return _object(record)

    def get(self, validation_id: str, tenant_id: str) -> ValidationObject:
        """As it is now, with its result. Raises `NotFoundError`."""
        record = self._find(validation_id, tenant_id)
        if record.status != "finished":
            return _object(record)
        data = json.loads(self._home.validation(record.id).read_text(encoding="utf-8"))
        return _object(record, validation_of(ValidationOutcome(**data["outcome"])))

    def page(self, tenant_id: str, after: str | None, limit: int) -> Page[ValidationObject]:
        """Newest first, without their results."""
        records = self._of(tenant_id)
        if after is not None:
            last = self._find(after, tenant_id)
            records = [record for record in records if record.order < last.order]
        shown = [_object(record) for record in records[:limit]]
        return Page(
            data=shown,
            has_more=len(records) > limit,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
        )

    def report(self, validation_id: str, tenant_id: str) -> FileResponse:
        """Its page with plots. Raises `NotFoundError`."""
        path = self._home.outlook_html(self._find(validation_id, tenant_id).id)
        if not path.is_file():
            raise NotFoundError(
                "there is no report yet.",
                code="report_not_ready",
                mend="It is written when the validation is finished, if what it checks is valid.",
            )
        return FileResponse(path, media_type="text/html")

    async def close(self) -> None:
        """End what runs, with its process. The next process of the service does it again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, validation_id: str) -> None:
        task = asyncio.create_task(self._run(validation_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
        finished = replace(self._known[validation_id], status="finished")
        await asyncio.to_thread(self._write, finished, outcome)
        self._known[validation_id] = finished
        ended = [r for r in self._of(finished.tenant_id) if r.status == "finished"]
        for old in ended[KEPT:]:
            del self._known[old.id]
            await asyncio.to_thread(shutil.rmtree, self._home.job(old.id), ignore_errors=True)

    def _of(self, tenant_id: str) -> list[Record]:
        """A tenant's, newest first."""
        known = list(self._known.values())  # asked for from other threads, too
        own = [record for record in known if record.tenant_id == tenant_id]
        return sorted(own, key=lambda record: record.order, reverse=True)

    def _find(self, validation_id: str, tenant_id: str) -> Record:
        record = self._known.get(validation_id)
        if record is None or record.tenant_id != tenant_id:
            raise NotFoundError(
                f"there is no validation {validation_id[:128]!r}.",
                mend=f"The newest {KEPT} are kept; send the request again.",
            )
        return record

    def _change(self, validation_id: str, **changes: Any) -> None:
        self._known[validation_id] = replace(self._known[validation_id], **changes)

    def _write(self, record: Record, outcome: ValidationOutcome | None = None) -> None:
        data: Mapping[str, Any] = {
            "record": asdict(record),
            "outcome": None if outcome is None else asdict(outcome),
        }
        write_private(self._home.validation(record.id), json.dumps(data))


@router.get("")
def list_validations(
    service: ServiceDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[ValidationObject]:
    """Validations with scores, newest first; ask for one of them to see its result."""
    if service.validations is None:
        return Page(data=[], has_more=False)
    return service.validations.page(caller.tenant_id, after, limit)


@router.get("/{validation_id}")
def retrieve_validation(validation_id: str, service: ServiceDep, caller: CallerDep) -> ValidationObject:
    """A validation with scores: its status, and its result once that is `finished`."""
    return _validations(service).get(validation_id, caller.tenant_id)


@router.get("/{validation_id}/report", response_class=FileResponse)
def validation_report(validation_id: str, service: ServiceDep, caller: CallerDep) -> FileResponse:
    """A self-contained HTML page: what each weighting would do to the rows, with plots."""
    return _validations(service).report(validation_id, caller.tenant_id)


def _validations(service: ServiceDep) -> Validations:
    if service.validations is None:
        raise NotFoundError("this service validates nothing.", mend="Start it with `modeseek serve`.")
    return service.validations


def validation_of(outcome: ValidationOutcome) -> Validation:
    """The outcome as the wire shows it."""
    error = None if outcome.error is None else JobError(**outcome.error)
    return Validation(valid=outcome.ok, error=error, report=dict(outcome.report))


def _object(record: Record, result: Validation | None = None) -> ValidationObject:
    return ValidationObject(
        id=record.id,
        created_at=int(record.created_at),
        status=record.status,
        url=f"{router.prefix}/{record.id}",
        result=result,
    )
