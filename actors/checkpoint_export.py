"""A Hugging Face model from a checkpoint that a job can resume from: its trainers load it and write it out.

Shards of ZeRO, a LoRA adapter beside frozen weights, several ranks: only the layout that wrote a
checkpoint can read it, so the same ranks are started once more, for as long as that takes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from actors.checkpoint import CheckpointStore
from actors.objective import objective_of
from actors.placement import Placement
from actors.trainer import TrainerSpec
from modeseek_ray.jobs.spec import JobSpec


async def export_checkpoint(job: JobSpec, checkpoint: Path, directory: Path, placement: Placement) -> None:
    """Write the model of `checkpoint`, which must verify, to `directory`: whole or not at all.

    Raises `StorageError` for a damaged checkpoint, `WorkerError` (`no_resources`) where there is no room
    for the job's trainers.
    """
    CheckpointStore(checkpoint.parent).verify(checkpoint)
    spec = TrainerSpec(
        model_path=str(job.model_path),
        objective=objective_of(job.config),
        training=job.config.training,
        resources=job.config.resources,
        seed=job.config.seed,
    )
    draft = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        trainers = await placement.trainers(spec, job.config.resources.trainers)
        try:
            await trainers.setup()
            await trainers.load(checkpoint)
            await trainers.export(draft)
        finally:
            await trainers.close()
    finally:
        await placement.close()
    draft.replace(directory)
