"""What drivers say about their job. Not for users: the bearer is the attempt's token, not an API key.

Every write checks (job, attempt, fence) in its own transaction; a stale one is answered 403
`stale_fence`, and that driver stops itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modeseek_ray.config import config_error, parse_config
from modeseek_ray.jobs.driver_store import Bearer, Progress
from modeseek_ray.jobs.errors import TokenError
from modeseek_ray.jobs.model_store import checkpoint_name, fine_tuned_name
from modeseek_ray.jobs.records import EventDraft, Results
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.service.body import read_json
from modeseek_ray.service.context import Service, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError

router = APIRouter(
    prefix="/internal/jobs/{job_id}/attempts/{attempt}", responses=ERROR_RESPONSES, include_in_schema=False
)
Body = TypeVar("Body", bound="DriverBody")


Count = Annotated[int, Field(ge=0, le=2**31 - 1)]  # what PostgreSQL's integers hold


class DriverBody(BaseModel):
    """Drivers may be newer than the service: fields it does not know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Heartbeat(DriverBody):
    step: Count = 0
    total_steps: Count | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    section: str | None = Field(None, max_length=64)
    deadline_s: float | None = None
    hyperparameters: dict[str, Any] | None = None


class DriverEvent(DriverBody):
    seq: Annotated[int, Field(ge=1, le=2**31 - 1)]
    created_at: float | None = None
    level: Literal["info", "warn", "error"] = "info"
    message: str = Field("", max_length=100_000)
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = Field(default_factory=dict)


class DriverEvents(DriverBody):
    events: list[DriverEvent] = Field(max_length=5_000)


class NewCheckpoint(DriverBody):
    step: Count
    path: str
    metrics: dict[str, Any] = Field(default_factory=dict)


class PrunedCheckpoint(DriverBody):
    path: str


class NewResults(DriverBody):
    fine_tuned_model_path: str | None = None
    result_files: list[str] = Field(default_factory=list)
    trained_tokens: int | None = None
    hyperparameters: dict[str, Any] | None = None


class NewState(DriverBody):
    to: str
    error: dict[str, Any] | None = None
    results: NewResults | None = None


async def get_bearer(
    job_id: str,
    attempt: int,
    authorization: Annotated[str, Header()] = "",
    x_modeseek_fence: Annotated[int, Header()] = -1,
) -> Bearer:
    """Who the driver says it is; the store finds out whether it is true."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise TokenError("no attempt token was given.", mend="Only drivers ask here.")
    return Bearer(job_id, attempt, x_modeseek_fence, token)


BearerDep = Annotated[Bearer, Depends(get_bearer)]


@router.get("")
def spec(bearer: BearerDep, service: ServiceDep) -> dict[str, Any]:
    """The job with everything resolved, and the checkpoint to go on from."""
    job = service.store.drivers.authorize(bearer)
    checkpoints = service.store.newest_checkpoints(job.id)
    resolved = JobSpec.read(service.home.config(job.id))
    config = parse_config(job.config)  # of now: a resumed job may have another number of trainers
    return {
        **replace(resolved, config=config).to_json(),
        "attempt": bearer.attempt,
        "fence": bearer.fence,
        "home": str(service.home.storage),
        "checkpoint": checkpoints[0] if checkpoints else None,
        "checkpoints": checkpoints,
    }


@router.get("/files/{role}")
def file(role: str, bearer: BearerDep, service: ServiceDep) -> FileResponse:
    """A data file of the job, for a driver whose node does not see its path."""
    job = service.store.drivers.authorize(bearer)
    path = JobSpec.read(service.home.config(job.id)).files.get(role)
    if path is None or not path.is_file():
        raise RequestError(
            f"the job has no {role} here." if path is None else f"{path} is not there any more.",
            param=role,
            mend="Submit the job again with a file that exists.",
        )
    return FileResponse(path, media_type="application/octet-stream")


@router.post("/heartbeat")
async def heartbeat(request: Request, bearer: BearerDep, service: ServiceDep) -> dict[str, Any]:
    """Renew the lease, and hear what is desired."""
    progress = await _read(request, service, Heartbeat)
    desired, lease_until = await run_in_threadpool(
        service.store.drivers.heartbeat, bearer, Progress(**progress.model_dump())
    )
    return {"desired": desired, "lease_until": lease_until}


@router.post("/events")
async def add_events(request: Request, bearer: BearerDep, service: ServiceDep) -> dict[str, Any]:
    """Store what is new of these; events known already are passed over."""
    batch = await _read(request, service, DriverEvents)
    drafts = [
        EventDraft(
            message=event.message,
            level=event.level,
            type=event.type,
            data=event.data,
            created_at=event.created_at,
            attempt=bearer.attempt,
            attempt_sequence=event.seq,
        )
        for event in batch.events
    ]
    stored = await run_in_threadpool(service.store.drivers.append_events, bearer, drafts)
    service.metrics.observe_events(stored.fresh, service.store.database.clock())
    return {"acknowledged": stored.acknowledged, "desired": stored.desired}


@router.post("/checkpoints")
async def add_checkpoint(request: Request, bearer: BearerDep, service: ServiceDep) -> dict[str, Any]:
    """Commit a checkpoint that is complete on disk."""
    new = await _read(request, service, NewCheckpoint)
    return await run_in_threadpool(_commit, service, bearer, new)


@router.post("/checkpoints/prune")
async def prune_checkpoint(request: Request, bearer: BearerDep, service: ServiceDep) -> dict[str, Any]:
    """Forget a checkpoint whose files are about to go."""
    pruned = await _read(request, service, PrunedCheckpoint)
    await run_in_threadpool(service.store.drivers.prune_checkpoint, bearer, Path(pruned.path))
    return {"pruned": pruned.path}


@router.post("/transition")
async def transition(request: Request, bearer: BearerDep, service: ServiceDep) -> dict[str, Any]:
    """Move the job on; with `succeeded` come its results."""
    new = await _read(request, service, NewState)
    answer = await run_in_threadpool(_move, service, bearer, new)
    service.wake()
    return answer


def _commit(service: Service, bearer: Bearer, new: NewCheckpoint) -> dict[str, Any]:
    job = service.store.drivers.authorize(bearer)
    path = _inside(service.home.checkpoints(job.id), new.path, is_directory=True)
    record = service.store.drivers.commit_checkpoint(
        bearer, new.step, path, new.metrics, checkpoint_name(job, new.step)
    )
    return {"id": record.id, "step": record.step}


def _move(service: Service, bearer: Bearer, new: NewState) -> dict[str, Any]:
    name = None
    results = None
    job = service.store.drivers.authorize(bearer, repeating=new.to)
    if new.to == "recovering":
        job = service.store.drivers.give_up(bearer, _public_error(new.error or {}))
        service.wake()
        return {"state": job.state, "desired": job.desired, "fine_tuned_model": None}
    if new.results is not None:
        name = fine_tuned_name(job)
        results = _results(service, bearer.job_id, new.results)
    error = None if new.error is None else _public_error(new.error)
    job = service.store.drivers.transition(bearer, new.to, error=error, results=results, model_name=name)
    return {"state": job.state, "desired": job.desired, "fine_tuned_model": job.fine_tuned_model}


def _results(service: Service, job_id: str, new: NewResults) -> Results:
    directory = service.home.job(job_id)
    model = new.fine_tuned_model_path
    return Results(
        fine_tuned_model_path=None if model is None else _inside(directory, model, is_directory=True),
        result_files=tuple(_inside(directory, path, is_directory=False) for path in new.result_files),
        trained_tokens=new.trained_tokens,
        hyperparameters=new.hyperparameters,
    )


def _public_error(error: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "code": str(error.get("code") or "internal_error"),
        "message": str(error.get("message") or "The driver gave no reason."),
        "param": error.get("param"),
    }


def _inside(directory: Path, name: str, *, is_directory: bool) -> Path:
    """A path of this job. A driver speaks for its own job's directory and for nothing else."""
    path = Path(name).resolve()
    exists = path.is_dir() if is_directory else path.is_file()
    if not path.is_relative_to(directory.resolve()) or not exists:
        raise RequestError(
            f"{name} is not a {'directory' if is_directory else 'file'} of this job.",
            mend=f"Results and checkpoints lie under {directory}.",
        )
    return path


async def _read(request: Request, service: Service, model: type[Body]) -> Body:
    body = await read_json(request, service.settings.max_driver_body_bytes)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise config_error(error) from None
