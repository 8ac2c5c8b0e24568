"""Rows of the store as frozen values."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

from sqlalchemy import Row

from modeseek_ray.jobs.states import TERMINAL, public_status

R = TypeVar("R")
Level = Literal["info", "warn", "error"]
DEFAULT_TENANT = "default"
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def new_id(prefix: str) -> str:
    """An id that cannot be guessed: 24 characters, 142 bits."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class Record:
    """A frozen row."""

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """Take the columns this record has; paths become `Path`."""
        values = row._mapping
        return cls(**{f.name: values[f.name] for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class JobRecord(Record):
    """A job as the store knows it. See `tables.jobs` for what each column means."""

    number: int
    id: str
    tenant_id: str
    version: int
    state: str
    desired: str
    priority: int
    config: dict[str, Any]
    file_ids: list[str]
    created_at: float
    state_at: float
    cancel_at: float | None
    finished_at: float | None
    attempt: int
    fence: int
    fruitless_attempts: int
    last_event: int
    step: int
    committed_step: int | None
    total_steps: int | None
    tokens_per_s: float | None
    eta_s: float | None
    section: str | None
    section_until: float | None
    hyperparameters: dict[str, Any] | None
    trained_tokens: int | None
    fine_tuned_model: str | None
    result_files: list[str]
    error: dict[str, Any] | None
    resumed_from: str | None

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def status(self) -> str:
        """The state as OpenAI's clients know it."""
        return public_status(self.state, self.committed_step)


@dataclass(frozen=True)
class AttemptRecord(Record):
    """One driver process for a job, alive or past."""

    job_id: str
    number: int
    fence: int
    token_sha256: str
    submission_id: str | None
    created_at: float
    heartbeat_at: float | None
    lease_until: float
    start_step: int | None
    last_sequence: int
    ended_at: float | None
    outcome: str | None


@dataclass(frozen=True)
class Inheritance:
    """The checkpoint that a job starts from because a failed one had committed it."""

    step: int
    path: Path  # the new job's own
    metrics: Mapping[str, Any]
    model: str  # its name


@dataclass(frozen=True)
class EventRecord(Record):
    """One line of a job's history."""

    job_id: str
    sequence: int
    created_at: float
    level: str
    type: str
    message: str
    data: dict[str, Any]
    attempt: int | None

    @property
    def id(self) -> str:
        return event_id(self.job_id, self.sequence)


@dataclass(frozen=True)
class EventDraft:
    """An event that has no place in the history yet."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: Mapping[str, Any] = field(default_factory=dict)
    created_at: float | None = None
    attempt: int | None = None
    attempt_sequence: int | None = None


@dataclass(frozen=True)
class CheckpointRecord(Record):
    """A checkpoint whose files are complete."""

    id: str
    job_id: str
    attempt: int
    step: int
    path: str
    model: str
    metrics: dict[str, Any]
    created_at: float
    deleted_at: float | None


@dataclass(frozen=True)
class FileRecord(Record):
    """An uploaded, registered or resulting file."""

    id: str
    tenant_id: str
    filename: str
    purpose: str
    bytes: int
    path: str
    owned: bool
    sha256: str | None
    job_id: str | None
    created_at: float


@dataclass(frozen=True)
class ModelRecord(Record):
    """A model that a job made."""

    name: str
    tenant_id: str
    job_id: str
    path: str
    created_at: float


@dataclass(frozen=True)
class KeyRecord(Record):
    """An API key without its secret."""

    id: str
    tenant_id: str
    name: str
    scopes: list[str]
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True)
class Results:
    """What a driver hands over with `succeeded`."""

    fine_tuned_model_path: Path | None = None
    result_files: tuple[Path, ...] = ()
    trained_tokens: int | None = None
    hyperparameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Page(Generic[R]):
    """Some records, and whether more follow."""

    data: list[R]
    has_more: bool


def event_id(job_id: str, sequence: int) -> str:
    """Ids of events say where in the history they stand, so that a stream can resume from one."""
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{sequence}"


def event_sequence(job_id: str, identifier: str) -> int | None:
    """The inverse of `event_id`; None when it is not an event of this job."""
    prefix = event_id(job_id, 0)[:-1]
    digits = identifier.removeprefix(prefix)
    if not identifier.startswith(prefix) or not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        return None
    return int(digits)
