"""`/v1/models`: base models that are built here and what jobs have made of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastapi import APIRouter

from modeseek_ray.errors import ModelError
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.models import resolve_model
from modeseek_ray.jobs.records import JobRecord, ModelRecord
from modeseek_ray.service.context import CallerDep, Service, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.service.wire import Deleted, ModelObject, Page

router = APIRouter(prefix="/v1/models", tags=["models"], responses=ERROR_RESPONSES)

_BASE_MODELS = ("playground/moe", "playground/dense")


@router.get("")
def list_models(service: ServiceDep, caller: CallerDep) -> Page[ModelObject]:
    """Models that a job may start from."""
    made = [_made(record) for record in service.store.models.all(caller.tenant_id)]
    base = [found for name in _BASE_MODELS if (found := _base(service, name)) is not None]
    data = made + base
    return Page(
        data=data,
        has_more=False,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/{name:path}")
def retrieve_model(name: str, service: ServiceDep, caller: CallerDep) -> ModelObject:
    """One model. Slashes in its name may be escaped or not."""
    record = service.store.models.find(name, caller.tenant_id)
    if record is not None:
        return _made(record)
    found = _base(service, name) if name in _BASE_MODELS else None
    if found is None:
        raise NotFoundError(
            f"there is no model {name[:256]!r}.", code="model_not_found", mend="List the models."
        )
    return found


@router.delete("/{name:path}")
def delete_model(name: str, service: ServiceDep, caller: CallerDep) -> Deleted:
    """Delete a model that a job made, and its files. Base models stay."""
    if name in _BASE_MODELS:
        raise RequestError("base models cannot be deleted.", param="model", mend="Only ft: models can.")
    known = service.store.models.find(name, caller.tenant_id) is not None
    # Of another tenant's model nothing is said, not even that it is in use.
    naming = service.store.jobs.living_that_name(name) if known else []
    job = next((job for job in naming if name in _models_of(job)), None)
    if job is not None:
        raise RequestError(
            f"job {job.id} still reads this model.",
            mend="Cancel the job, or wait for its end.",
            code="model_in_use",
        )
    record = service.store.models.delete(name, caller.tenant_id)
    path = Path(record.path).resolve()
    service.store.engines.stop_model(str(path))  # nobody can ask it any more
    service.wake()
    if path.is_relative_to(service.home.job(record.job_id).resolve()):
        shutil.rmtree(path, ignore_errors=True)
    return Deleted(id=name, object="model")


def _models_of(job: JobRecord) -> tuple[str | None, str | None]:
    return job.config["model"], job.config.get("behavior_model")


def _made(record: ModelRecord) -> ModelObject:
    return ModelObject(
        id=record.name,
        created=int(record.created_at),
        owned_by=record.tenant_id,
        fine_tuning_job_id=record.job_id,
    )


def _base(service: Service, name: str) -> ModelObject | None:
    try:
        path = resolve_model(name, service.home)
    except ModelError:
        return None
    return ModelObject(id=name, created=int((path / "config.json").stat().st_mtime), owned_by="playground")
