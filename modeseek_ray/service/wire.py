"""What goes over the wire: OpenAI's objects with our extra fields, and how they are made from records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from modeseek_ray.config import parse_config
from modeseek_ray.jobs.queue import Place
from modeseek_ray.jobs.records import CheckpointRecord, EventRecord, FileRecord, JobRecord
from modeseek_ray.strict import Strict

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """A list in OpenAI's shape; ask again with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class FileObject(BaseModel):
    """An uploaded, registered or resulting file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


class Deleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: str
    deleted: bool = True


class Progress(BaseModel):
    """How far a job is. Rates and times are of the present attempt."""

    step: int
    total_steps: int | None
    tokens_per_s: float | None
    eta_s: float | None


class JobError(BaseModel):
    """Why a job failed."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    param: str | None = None


class JobObject(BaseModel):
    """A fine-tuning job. `status` is OpenAI's, or `paused`; `state` is ours, finer."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    state: str
    error: JobError | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    resources: dict[str, Any]
    result_files: list[str]
    seed: int
    suffix: str | None
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    retention_file: str | None
    replay_file: str | None
    behavior_model: str | None
    integrations: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    progress: Progress
    attempt: int
    queue_position: int | None
    estimated_start: int | None
    last_checkpoint_step: int | None
    resumed_from: str | None


class EventObject(BaseModel):
    """One line of a job's history."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointObject(BaseModel):
    """A checkpoint that can be resumed from."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class ModelObject(BaseModel):
    """A model that jobs can start from."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    fine_tuning_job_id: str | None = None


class Validation(BaseModel):
    """What a submission would have said."""

    valid: bool
    error: JobError | None = None
    report: dict[str, Any] = Field(default_factory=dict)


class ValidationObject(BaseModel):
    """A validation with scores, which takes a while: ask again at `url` until it is finished."""

    id: str
    object: Literal["fine_tuning.validation"] = "fine_tuning.validation"
    created_at: int
    status: Literal["queued", "running", "finished"]
    url: str
    result: Validation | None = None


class Registration(Strict):
    """Name a file that is on the cluster already."""

    path: str = Field(min_length=1, max_length=4096)
    """Its full path, under one of the operator's allowed roots."""
    purpose: Literal["fine-tune"] = "fine-tune"


class ResumedResources(Strict):
    """Of a job's `resources`, what may change when it goes on."""

    trainers: int | None = Field(None, ge=1, le=4096)
    """DeepSpeed ranks; None = as many as before. Below ZeRO-3 only, and inexact: with as many as before the
    weights are those of a run in one go, with others gradients are summed in another order."""


class Resumption(Strict):
    """What is to be other than it was. Nothing, where the body is left away."""

    resources: ResumedResources = Field(default_factory=ResumedResources)


def file_object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=int(record.created_at),
        filename=record.filename,
        purpose=record.purpose,
    )


def job_object(job: JobRecord, place: Place | None, now: float) -> JobObject:
    """The job as users see it; what was left to "auto" shows the value it became. `place`: in the queue."""
    config = parse_config(job.config)
    picked = dict(job.hyperparameters or {})
    training = config.training
    hyperparameters = {
        "n_epochs": picked.pop("epochs", training.epochs),
        "batch_size": training.batch_size,
        "learning_rate_multiplier": training.learning_rate_multiplier,
        "learning_rate": training.learning_rate,
        **picked,
    }
    runs = job.status == "running" and job.eta_s is not None
    return JobObject(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        estimated_finish=int(now + job.eta_s) if runs and job.eta_s is not None else None,
        model=config.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.tenant_id,
        status=job.status,
        state=job.state,
        error=None if job.error is None else JobError(**job.error),
        hyperparameters=hyperparameters,
        method=config.method.model_dump(mode="json", exclude_unset=True),
        resources=config.resources.model_dump(mode="json"),
        result_files=job.result_files,
        seed=config.seed,
        suffix=config.suffix,
        trained_tokens=job.trained_tokens,
        training_file=config.training_file,
        validation_file=config.validation_file,
        retention_file=config.retention_file,
        replay_file=config.replay_file,
        behavior_model=config.behavior_model,
        integrations=job.config.get("integrations"),
        metadata=config.metadata,
        progress=Progress(
            step=job.step,
            total_steps=job.total_steps,
            tokens_per_s=job.tokens_per_s if runs else None,
            eta_s=job.eta_s if runs else None,
        ),
        attempt=job.attempt,
        queue_position=None if place is None else place.position,
        estimated_start=None if place is None else int(now + place.starts_in_s),
        last_checkpoint_step=job.committed_step,
        resumed_from=job.resumed_from,
    )


def event_object(event: EventRecord) -> EventObject:
    return EventObject(
        id=event.id,
        created_at=int(event.created_at),
        level=event.level,  # type: ignore[arg-type]
        message=event.message,
        type=event.type,  # type: ignore[arg-type]
        data={"created_at_s": event.created_at, **event.data},
    )


def checkpoint_object(checkpoint: CheckpointRecord) -> CheckpointObject:
    return CheckpointObject(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **_openai_names(checkpoint.metrics)},
    )


def _openai_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Ours beside OpenAI's names where the two mean the same."""
    same = {
        "loss": "train_loss",
        "accuracy": "train_mean_token_accuracy",
        "validation_nll": "valid_loss",
        "validation_token_accuracy": "valid_mean_token_accuracy",
    }
    return {**metrics, **{theirs: metrics[ours] for ours, theirs in same.items() if ours in metrics}}
