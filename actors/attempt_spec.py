"""What an attempt starts from, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.driver import Outcome
from modeseek_ray.config import JobConfig
from modeseek_ray.rewards.endpoints import Endpoint

FROM_DISK = Path("newest")


@dataclass(frozen=True)
class AttemptSpec:
    """What an attempt starts from."""

    job_id: str
    attempt: int
    config: JobConfig
    files: Mapping[str, Path]  # by role: training_file, validation_file, retention_file, replay_file
    model_path: Path
    directory: Path  # the job's: checkpoints/, results/, model/
    cache: Path  # shared by jobs: reference scores
    behavior_model_path: Path | None = None
    endpoints: tuple[Endpoint, ...] = ()  # judges that graders may ask
    judges: Mapping[str, Path] = field(default_factory=dict)  # graders' local classifiers, by name
    # The newest checkpoint that a store has committed (None = none yet). FROM_DISK: no store keeps
    # this job's history, so a checkpoint that is complete on disk is committed.
    committed: Path | None = FROM_DISK


@dataclass(frozen=True)
class AttemptResult:
    """How it ended, and what there is to show."""

    outcome: Outcome
    model_path: Path | None = None
    result_files: Sequence[Path] = ()
    picked: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
