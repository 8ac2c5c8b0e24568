"""Models and checkpoints in the store, by the names users call them."""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import select, update

from modeseek_ray.jobs.database import Database
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.records import JobRecord, ModelRecord
from modeseek_ray.jobs.tables import checkpoints, jobs, models


class ModelStore:
    """What jobs made. A deleted model is hidden, its row stays."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, tenant_id: str | None = None) -> list[ModelRecord]:
        """Newest first."""
        query = select(models).where(models.c.deleted_at.is_(None)).order_by(models.c.created_at.desc())
        if tenant_id is not None:
            query = query.where(models.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            return [ModelRecord.of(row) for row in connection.execute(query)]

    def find(self, name: str, tenant_id: str | None = None) -> ModelRecord | None:
        query = select(models).where(models.c.name == name, models.c.deleted_at.is_(None))
        if tenant_id is not None:
            query = query.where(models.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else ModelRecord.of(row)

    def checkpoint_path(self, name: str, tenant_id: str | None = None) -> Path | None:
        """Where the checkpoint called `name` lies: the newest attempt's, if several wrote that step."""
        query = (
            select(checkpoints.c.path)
            .join(jobs, jobs.c.id == checkpoints.c.job_id)
            .where(checkpoints.c.model == name, checkpoints.c.deleted_at.is_(None))
            .order_by(checkpoints.c.attempt.desc())
            .limit(1)
        )
        if tenant_id is not None:
            query = query.where(jobs.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            path = connection.execute(query).scalar_one_or_none()
        return None if path is None else Path(path)

    def delete(self, name: str, tenant_id: str | None = None) -> ModelRecord:
        """Hide the model. The caller removes its directory afterwards. Raises `NotFoundError`."""
        record = self.find(name, tenant_id)
        if record is None:
            raise NotFoundError(
                f"there is no model {name!r}.", code="model_not_found", mend="List the models."
            )
        with self._database.write() as connection:
            connection.execute(
                update(models).where(models.c.name == name).values(deleted_at=self._database.clock())
            )
        return record


def fine_tuned_name(job: JobRecord) -> str:
    """`ft:base:organisation:suffix:id`, as OpenAI names models; a directory is called by its last part."""
    base = str(job.config["model"])
    if base.startswith("ft:"):
        base = base.split(":")[1]
    elif base.startswith(("/", "~", ".")):
        base = Path(base).name
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.config.get("suffix") or "")
    return f"ft:{base.replace(':', '-')}:{job.tenant_id}:{suffix}:{job.id.removeprefix('ftjob-')[:12]}"


def checkpoint_name(job: JobRecord, step: int) -> str:
    """The fine-tuned model's name with the step behind it."""
    return f"{fine_tuned_name(job)}:ckpt-step-{step}"
