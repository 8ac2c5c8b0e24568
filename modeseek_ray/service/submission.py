"""From a request's body to an accepted job: everything that can be checked without a tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.data.loading import read_rows
from modeseek_ray.data.problems import Problems, raise_first
from modeseek_ray.data.prompts import read_prompts
from modeseek_ray.data.reader import unpacked_bytes
from modeseek_ray.data.report import FileReport
from modeseek_ray.data.rows import Row
from modeseek_ray.data.weighting import refuse_impossible_weighting
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.fit import refuse_what_never_fits
from modeseek_ray.jobs.integrations import check_integrations
from modeseek_ray.jobs.job_store import new_job_id
from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import plan
from modeseek_ray.jobs.records import FileRecord, JobRecord
from modeseek_ray.jobs.spec import FILE_ROLES, JobSpec
from modeseek_ray.rewards.build import local_models
from modeseek_ray.rewards.endpoints import read_endpoints
from modeseek_ray.service.context import Caller, Service
from modeseek_ray.service.files import check_readable

_DATA_ROLES = {"training_file": "training", "replay_file": "replay", "validation_file": "validation"}


@dataclass(frozen=True)
class Checked:
    """A configuration whose names all lead somewhere."""

    config: JobConfig
    files: dict[str, FileRecord]
    model_path: Path
    behavior_model_path: Path | None
    judges: dict[str, Path]  # the grader's local classifiers, by the names the job calls them

    def spec(self, service: Service, job_id: str) -> JobSpec:
        return JobSpec(
            job_id=job_id,
            config=self.config,
            files={role: Path(record.path) for role, record in self.files.items()},
            filenames={role: record.filename for role, record in self.files.items()},
            model_path=self.model_path,
            behavior_model_path=self.behavior_model_path,
            judges=self.judges,
            home=service.home.storage,
        )


def check(service: Service, caller: Caller, body: Any, capacity: Capacity | None = None) -> Checked:
    """Raises the first problem as a `ModeseekError` that names the field, or the file and line."""
    config = parse_config(body)
    refuse_impossible_weighting(config)
    check_integrations(config)
    files = {
        role: _file(service, caller, role, name)
        for role in FILE_ROLES
        if (name := getattr(config, role)) is not None
    }
    model_path = service.resolve_model(config.model, caller.tenant_id)
    behavior = config.behavior_model
    behavior_path = None
    if behavior is not None:
        behavior_path = service.resolve_model(behavior, caller.tenant_id, "behavior_model")
    if capacity is not None:
        refuse_what_never_fits(plan(config, ModelInfo.read(model_path)), capacity)
    judges = {} if config.grader is None else _judges(service, caller, config)
    training = _check_rows(service, files, asks=config.rollout is not None)
    refuse_impossible_weighting(config, training)
    return Checked(config, files, model_path, behavior_path, judges)


def accept(
    service: Service,
    caller: Caller,
    body: dict[str, Any],
    checked: Checked,
    *,
    idempotency_key: str | None,
    body_sha256: str,
) -> JobRecord:
    """Store the job. Its directory is complete before the row exists, so an answered job has all it needs."""
    job_id = new_job_id()
    checked.spec(service, job_id).write(service.home.config(job_id))
    try:
        job, is_new = service.store.jobs.submit(
            job_id,
            body,
            tenant_id=caller.tenant_id,
            file_ids=[record.id for record in checked.files.values()],
            idempotency_key=idempotency_key,
            body_sha256=body_sha256,
        )
    except BaseException:
        shutil.rmtree(service.home.job(job_id), ignore_errors=True)
        raise
    if is_new:
        service.wake()
    else:
        shutil.rmtree(service.home.job(job_id), ignore_errors=True)
    return job


def _file(service: Service, caller: Caller, role: str, file_id: str) -> FileRecord:
    try:
        record = service.store.files.get(file_id, caller.tenant_id)
    except NotFoundError:
        raise ConfigError(
            f"there is no file {file_id[:128]!r}.",
            param=role,
            mend="Upload it to /v1/files and give the id it gets.",
            code="file_not_found",
        ) from None
    check_readable(service, record, role)
    # The rollouts of a job may be weighed anew by another.
    is_rollouts = record.purpose == "fine-tune-results" and record.filename.endswith("rollouts.parquet")
    if record.purpose != "fine-tune" and not is_rollouts:
        raise ConfigError(
            f"file {file_id} has the purpose {record.purpose!r}.",
            param=role,
            mend='Upload it with the purpose "fine-tune".',
            code="invalid_purpose",
        )
    return record


def _judges(service: Service, caller: Caller, config: JobConfig) -> dict[str, Path]:
    """Directories of local classifiers, which the tenant must be allowed; endpoints, the operator must allow."""
    endpoints = read_endpoints(service.home.endpoints)
    param = f"method.{config.method.type}.grader"
    return {
        section.model: service.resolve_model(section.model, caller.tenant_id, f"{path}.model")
        for path, section in local_models(config.grader, endpoints=endpoints, param=param)
    }


def _check_rows(service: Service, files: dict[str, FileRecord], *, asks: bool) -> FileReport | None:
    """Read small files line by line; large ones wait for the validation process.

    `asks`: the training file is one of questions, which the generator answers. Returns what there is in
    the training file, if it was read and is one of answers.
    """
    found = []
    training: FileReport | None = None
    for role, record in files.items():
        if max(record.bytes, unpacked_bytes(Path(record.path))) > service.settings.max_checked_bytes:
            continue
        problems = Problems(record.filename)
        rows: Iterable[Any]
        if asks and role == "training_file":
            rows = read_prompts(Path(record.path), problems)
        else:
            rows = read_rows(Path(record.path), problems, _DATA_ROLES.get(role, "retention"))  # type: ignore[arg-type]
        report = (
            None if asks or role != "training_file" else FileReport(record.filename, "training", problems)
        )
        for row in rows:
            if report is not None and isinstance(row, Row):
                report.add_row(row)
        training = training or report
        found.append(problems)
    raise_first(found)
    return training
