"""What the reconciler asks of the cluster and of the validation process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

LaunchStatus = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]

# Nothing of the attempt runs any more. "unknown" is not here: an unreachable cluster says nothing.
ENDED: frozenset[LaunchStatus] = frozenset({"succeeded", "failed", "stopped"})


@dataclass(frozen=True)
class Capacity:
    """What the whole cluster has, and its largest node: what is there, whether free or not."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float


class Launcher(Protocol):
    """Starts and stops the one driver process of an attempt."""

    async def launch(self, job_id: str, attempt: int, secret_path: Path) -> str:
        """Start the driver and return its submission id.

        Called again with the same job and attempt after a crash, it must find and adopt the
        driver that is already there, never start a second one. `WorkerError` says that the cluster
        cannot be reached now: it is called again later. Any other error ends the attempt.
        """
        ...

    async def stop(self, submission_id: str) -> None:
        """Ask for the end of the driver and everything it owns; returns without waiting for it."""
        ...

    async def status(self, submission_id: str) -> LaunchStatus: ...

    async def capacity(self) -> Capacity | None:
        """None where it is not known, or grows on demand."""
        ...

    async def logs(self, submission_id: str) -> str | None:
        """What the driver has printed; None where nothing is kept of it."""
        ...


@dataclass(frozen=True)
class ValidationOutcome:
    """What the validation of a job's model and data found.

    `error` has `code`, `message` and `param`, as the API shows it; `report` is shown as events' data.
    """

    ok: bool
    error: Mapping[str, Any] | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


class Validator(Protocol):
    """Checks what needs a tokenizer, away from the API's process. Reads `Home.config(job_id)`."""

    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        """With `score`, rows are scored under the start too, which may take many minutes."""
        ...
