"""Data files that the driver's node does not see: asked of the service, by what they are to the job."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from modeseek_ray.client import AttemptClient


async def fetch_missing(client: AttemptClient, files: Mapping[str, Path], directory: Path) -> dict[str, Path]:
    """`files` by role, each at a path that is there. Those that are not are fetched into `directory`.

    A file registered by its path may lie on a disk of the service's machine alone. Raises `ServiceError`.
    """
    found = {}
    for role, path in files.items():
        target = path
        if not await asyncio.to_thread(path.is_file):
            target = directory / f"{role}{path.suffix}"
            await client.fetch(role, target)
        found[role] = target
    return found
