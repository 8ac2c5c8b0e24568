"""Whether the cluster, all of it, can hold a job: asked when it is submitted, and again before it starts.

A job that was accepted while nobody knew the cluster, or before it lost nodes, would take a place among the
running ones, wait for workers in vain, and come back to the head of the queue for ever.
"""

from __future__ import annotations

import logging

from modeseek_ray.config import parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.plan import Plan, plan
from modeseek_ray.jobs.records import JobRecord
from modeseek_ray.jobs.spec import JobSpec

log = logging.getLogger(__name__)


def refuse_what_never_fits(wanted: Plan, capacity: Capacity) -> None:
    """Raises `ConfigError` for a job that would wait for ever, with what it needs and what there is."""
    for name, needed, there in (
        ("CPUs", wanted.cpus, capacity.cpus),
        ("GPUs", wanted.gpus, capacity.gpus),
    ):
        if needed > there:
            raise ConfigError(
                f"the job needs {needed:g} {name} at a time, the whole cluster has {there:g}.",
                param="resources",
                mend="Ask for fewer workers, or for less per worker; or have nodes added.",
                code="does_not_fit",
            )
    for process in wanted.processes:
        if process.cpus_each > capacity.node_cpus or process.gpus_each > capacity.node_gpus:
            raise ConfigError(
                f"one {process.role} needs {process.cpus_each:g} CPUs and {process.gpus_each:g} GPUs on one"
                f" node; the largest has {capacity.node_cpus:g} and {capacity.node_gpus:g}.",
                param="resources",
                mend="Ask for less per worker.",
                code="does_not_fit",
            )


def why_it_waits(home: Home, job: JobRecord, capacity: Capacity) -> str | None:
    """What a queued job needs and the cluster has not; None where it fits, or where that cannot be told."""
    try:
        model = ModelInfo.read(JobSpec.read(home.config(job.id)).model_path)
        refuse_what_never_fits(plan(parse_config(job.config), model), capacity)
    except ConfigError as error:
        return error.message if error.code == "does_not_fit" else None
    except Exception as error:  # its driver will say what is wrong
        log.warning("what %s needs is not known: %s", job.id, error)
    return None
