"""A failed job goes on as a new one: what has ended never changes, and what it had committed is not lost.

The new job has the same configuration and files, is checked like any other, and starts from the
failed one's newest committed checkpoint. Checkpoints and rounds of samples are shared by hard links
where the file system has them, results are copied: the new job appends to them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from modeseek_ray.jobs.job_store import new_job_id
from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.jobs.model_store import checkpoint_name
from modeseek_ray.jobs.records import CheckpointRecord, Inheritance, JobRecord
from modeseek_ray.service.context import Caller, Service
from modeseek_ray.service.submission import check

_SHARED = ("rollouts", "rounds")  # written once each, never changed


def resume(service: Service, caller: Caller, job_id: str, capacity: Capacity | None) -> JobRecord:
    """Let a paused job go on, or start a new job where a failed one ended.

    Asked again, the successor of a failed job is returned as long as it lives. Raises
    `IllegalTransitionError` for other states, and what a submission raises: a file or the model may
    have been deleted since.
    """
    failed = service.store.jobs.get(job_id, caller.tenant_id)
    if failed.state != "failed":
        return service.store.jobs.resume(job_id, caller.tenant_id)
    checked = check(service, caller, failed.config, capacity)
    new_id = new_job_id()
    directory = service.home.job(new_id)
    try:
        checked.spec(service, new_id).write(service.home.config(new_id))
        checkpoint = _newest(service, failed)
        inherited = None
        if checkpoint is not None:
            path = service.home.checkpoints(new_id) / f"step-{checkpoint.step}.a0"
            _copy(service, failed, directory, Path(checkpoint.path), path)
            name = checkpoint_name(replace(failed, id=new_id), checkpoint.step)
            inherited = Inheritance(checkpoint.step, path, checkpoint.metrics, name)
        job, is_new = service.store.jobs.succeed(failed, new_id, inherited)
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
