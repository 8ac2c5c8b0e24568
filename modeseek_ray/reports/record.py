"""`job.json`: what was asked, what was picked, what became of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from modeseek_ray.errors import StorageError

JOB_FILE = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """`job.json`: what was asked, what was picked, what became of it. Times are Unix seconds.

    >>> JobRecord(id="ftjob-1", name="demo", config={}, model="playground/moe").status
    'running'
    """

    id: str
    name: str
    config: Mapping[str, Any]  # as submitted
    model: str
    picked: Mapping[str, Any] = field(default_factory=dict)  # what "auto" became
    status: str = "running"
    attempt: int = 1
    started_at: float | None = None
    finished_at: float | None = None
    fine_tuned_model: str | None = None
    total_steps: int | None = None
    weights_sha256: str | None = None  # of the exported weights: equal hashes mean equal bits
    error: Mapping[str, Any] | None = None  # code, message, param, mend
    warnings: tuple[Mapping[str, Any], ...] = ()  # code, message, param

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JobRecord:
        """Fields written by a newer version are ignored."""
        known = {f.name for f in fields(cls)} & set(data)
        return cls(**{name: data[name] for name in known if name != "warnings"}, warnings=_warnings(data))


def _warnings(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(w if isinstance(w, Mapping) else {"message": str(w)} for w in data.get("warnings", ()))


def write_job(directory: Path, record: JobRecord) -> None:
    """Replace `job.json` in one step: a reader sees the old record or the new one."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False, default=str)
    write_atomically(directory / JOB_FILE, text.encode())


def read_job(directory: Path) -> JobRecord:
    """Read `job.json`. Raises `StorageError` when the directory is not a job's."""
    path = directory / JOB_FILE
    try:
        return JobRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise StorageError(
            "there is no job.json here.", file=str(path), mend="Name a job's result directory."
        ) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise StorageError(
            f"cannot be read: {error}.",
            file=str(path),
            mend="The file was changed or cut; run the job again.",
        ) from None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path`: a reader, and a restart after a power cut, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
