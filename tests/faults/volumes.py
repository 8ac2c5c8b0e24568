"""Small volumes that can be filled: one for the store, one for a job's checkpoints.

Mounting needs root. Without it they are plain directories, and the hooks limit what the process that is
to meet a full disk may write.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modeseek_ray.client import Client
from modeseek_ray.errors import ServiceError
from tests.faults.cells import Cell

MIB = 1 << 20


class Volumes:
    """`mount` as many as are needed; `unmount` all at the end."""

    def __init__(self) -> None:
        self._mounted: list[Path] = []

    def mount(self, directory: Path, size: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            self._mounted.append(directory)

    def unmount(self) -> None:
        while self._mounted:
            subprocess.run(["umount", "-l", str(self._mounted.pop())], capture_output=True)


class Relief:
    """Gives space back: to a full store after a while, to a job when it has paused for want of it."""

    def __init__(self, cell: Cell | None, directory: Path, fired: Path, *, probe: Path) -> None:
        """`directory` is full once `fired` is there; `probe` is a data file, uploaded to see what is answered."""
        self._cell = cell
        self._directory = directory
        self._fired = fired
        self._probe = probe
        self._full = cell is not None and cell.volume == "store"
        self._paused = False
        self._answers: Counter[int] = Counter()  # HTTP status -> uploads, while the store was full

    def of_store(self, client: Client) -> None:
        if self._cell is None or not self._full or not self._fired.exists():
            return
        self._probe.write_text('{"prompt": "a", "completion": "b"}\n')
        try:
            client.upload(self._probe)
            self._answers[200] += 1
        except ServiceError as error:
            self._answers[error.http_status] += 1
        if time.time() > json.loads(self._fired.read_text())["at"] + self._cell.seconds:
            (self._directory / "ballast").unlink(missing_ok=True)
            self._full = False

    def of_job(self, client: Client, job: Mapping[str, Any]) -> None:
        if self._cell is not None and self._cell.action in ("ENOSPC", "FULL") and job["status"] == "paused":
            self._paused = True
            (self._directory / "ballast").unlink(missing_ok=True)
            client.resume(job["id"])

    def problems(self) -> Iterator[str]:
        """A full volume that nobody noticed shows nothing."""
        if self._cell is None or self._cell.volume is None:
            return
        if self._cell.volume == "data" and not self._paused:
            yield "the job did not pause"
        if self._cell.volume == "store" and not (self._answers[503] and set(self._answers) <= {200, 503}):
            yield f"a full store answered {dict(self._answers)} (status: how often)"
