"""A job with every name resolved: what the validation process and the driver are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.jobs.paths import write_private

FILE_ROLES = ("training_file", "validation_file", "retention_file", "replay_file")


@dataclass(frozen=True)
class JobSpec:
    """A job's configuration and where its inputs lie.

    `files` maps those of `FILE_ROLES` that the job has to paths; `filenames` to the names their
    owner knows them by, for messages. `judges` maps the names of the grader's local classifiers to
    directories. `checkpoint` is the newest committed one, to resume from.
    """

    job_id: str
    config: JobConfig
    files: Mapping[str, Path]
    model_path: Path
    behavior_model_path: Path | None = None
    judges: Mapping[str, Path] = field(default_factory=dict)
    filenames: Mapping[str, str] = field(default_factory=dict)
    home: Path | None = None
    attempt: int = 0
    fence: int = 0
    checkpoint: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "files": {role: str(path) for role, path in self.files.items()},
            "filenames": dict(self.filenames),
            "model_path": str(self.model_path),
            "behavior_model_path": _text(self.behavior_model_path),
            "judges": {name: str(path) for name, path in self.judges.items()},
            "home": _text(self.home),
            "attempt": self.attempt,
            "fence": self.fence,
            "checkpoint": _text(self.checkpoint),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobSpec:
        """The inverse of `to_json`. Raises `ConfigError` when the configuration does not hold."""
        return cls(
            job_id=data["job_id"],
            config=parse_config(data["config"]),
            files={role: Path(path) for role, path in data["files"].items()},
            filenames=dict(data.get("filenames") or {}),
            model_path=Path(data["model_path"]),
            behavior_model_path=_path(data.get("behavior_model_path")),
            judges={name: Path(path) for name, path in (data.get("judges") or {}).items()},
            home=_path(data.get("home")),
            attempt=data.get("attempt", 0),
            fence=data.get("fence", 0),
            checkpoint=_path(data.get("checkpoint")),
        )

    def write(self, path: Path) -> None:
        write_private(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1))

    @classmethod
    def read(cls, path: Path) -> JobSpec:
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
