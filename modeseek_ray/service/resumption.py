"""A failed job goes on as a new one: what has ended never changes, and what it had committed is not lost.

The new job has the same configuration and files, is checked like any other, and starts from the
failed one's newest committed checkpoint. Checkpoints and rounds of samples are shared by hard links
where the file system has them, results are copied: the new job appends to them.

Both it and a paused job may go on with another number of trainers, where the checkpoint can be dealt out
anew (`actors/resharding.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modeseek_ray.config import Resources, parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.errors import IllegalTransitionError
from modeseek_ray.jobs.job_store import new_job_id
from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.jobs.model_store import checkpoint_name
from modeseek_ray.jobs.paths import write_private
from modeseek_ray.jobs.records import CheckpointRecord, EventDraft, Inheritance, JobRecord
from modeseek_ray.service.context import Caller, Service
from modeseek_ray.service.submission import check
from modeseek_ray.service.wire import Resumption

_SHARED = ("rollouts", "rounds")  # written once each, never changed


def resume(
    service: Service, caller: Caller, job_id: str, capacity: Capacity | None, changes: Resumption
) -> JobRecord:
    """Let a paused job go on, or start a new job where a failed one ended.

    Asked again, the successor of a failed job is returned as long as it lives. Raises
    `IllegalTransitionError` for other states, and what a submission raises: a file or the model may
    have been deleted since, and another number of trainers may not fit.
    """
    job = service.store.jobs.get(job_id, caller.tenant_id)
    trainers = changes.resources.trainers
    if job.state == "failed":
        successor = _succeed(service, caller, job, capacity, trainers)
        return _with(successor, trainers)
    if trainers is None or trainers == _trainers(job):
        return service.store.jobs.resume(job_id, caller.tenant_id)
    if job.state != "paused":
        raise IllegalTransitionError(
            f"job {job_id} is {job.state}: only a paused or failed job goes on with other trainers.",
            mend="Pause it, and resume it once its status is `paused`.",
        )
    config = with_trainers(job.config, trainers)
    checked = check(service, caller, config, capacity)
    note = _note(_trainers(job), checked.config.resources, goes_on=job.committed_step is not None)
    path = service.home.config(job_id)
    before = path.read_bytes()
    checked.spec(service, job_id).write(path)  # who reads a checkpoint needs the ranks that it is made for
    try:
        return service.store.jobs.resume(job_id, caller.tenant_id, config=config, note=note)
    except BaseException:
        write_private(path, before.decode())
        raise


def with_trainers(config: Mapping[str, Any], trainers: int) -> dict[str, Any]:
    """The request's body with another number of trainers; all else as it was written."""
    return {**config, "resources": {**(config.get("resources") or {}), "trainers": trainers}}


def _trainers(job: JobRecord) -> int:
    return parse_config(job.config).resources.trainers


def _note(before: int, resources: Resources, *, goes_on: bool) -> EventDraft:
    """What the job's history says of it. Raises `ConfigError` where its checkpoint cannot be dealt out anew."""
    data = {"trainers": resources.trainers, "trainers_before": before}
    what = f"It goes on with {resources.trainers} trainers instead of {before}"
    if not goes_on:  # nothing has been trained yet
        return EventDraft(f"{what}.", data=data)
    if resources.zero_stage == 3:
        raise ConfigError(
            f"a checkpoint of ZeRO-3 can only be read by the {before} trainers that wrote it.",
            param="resources.trainers",
            mend="Resume without another number; or start a new job with zero_stage 2 or less.",
        )
    if resources.dtype == "bfloat16" and resources.zero_stage < 2:
        raise ConfigError(
            f"a bfloat16 checkpoint of ZeRO-{resources.zero_stage} can only be read by the {before} trainers that"
            " wrote it.",
            param="resources.trainers",
            mend="Resume without another number; with zero_stage 2, or in float32, it may change.",
        )
    return EventDraft(
        f"{what}: not exactly as before, for gradients are summed in another order from here on.",
        "warn",
        data=data,
    )


def _with(successor: JobRecord, trainers: int | None) -> JobRecord:
    """The successor, which lives already, may have been asked for with another number."""
    if trainers is not None and _trainers(successor) != trainers:
        raise IllegalTransitionError(
            f"the job goes on already, as {successor.id} with {_trainers(successor)} trainers.",
            mend="Pause that one, and resume it with the number you want.",
        )
    return successor


def _succeed(
    service: Service, caller: Caller, failed: JobRecord, capacity: Capacity | None, trainers: int | None
) -> JobRecord:
    moves = trainers is not None and trainers != _trainers(failed)
    config = with_trainers(failed.config, trainers) if moves and trainers is not None else failed.config
    checked = check(service, caller, config, capacity)
    checkpoint = _newest(service, failed)
    note = None
    if moves:
        note = _note(_trainers(failed), checked.config.resources, goes_on=checkpoint is not None)
    new_id = new_job_id()
    directory = service.home.job(new_id)
    try:
        checked.spec(service, new_id).write(service.home.config(new_id))
        inherited = None
        if checkpoint is not None:
            path = service.home.checkpoints(new_id) / f"step-{checkpoint.step}.a0"
            _copy(service, failed, directory, Path(checkpoint.path), path)
            name = checkpoint_name(replace(failed, id=new_id), checkpoint.step)
            inherited = Inheritance(checkpoint.step, path, checkpoint.metrics, name)
        job, is_new = service.store.jobs.succeed(failed, new_id, inherited, config=config, note=note)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    if not is_new:
        shutil.rmtree(directory, ignore_errors=True)
    return job


def _newest(service: Service, job: JobRecord) -> CheckpointRecord | None:
    """The newest committed checkpoint whose files are there. A driver verifies it before it goes on."""
    page = service.store.jobs.checkpoints(job.id, limit=1000)
    return next((record for record in page.data if Path(record.path).is_dir()), None)


def _copy(service: Service, failed: JobRecord, directory: Path, checkpoint: Path, target: Path) -> None:
    shutil.copytree(checkpoint, target, copy_function=_link)
    old = service.home.job(failed.id)
    for name in _SHARED:
        if (old / name).is_dir():
            shutil.copytree(old / name, directory / name, copy_function=_link)
    if service.home.results(failed.id).is_dir():
        shutil.copytree(service.home.results(failed.id), directory / "results")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
