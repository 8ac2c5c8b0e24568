"""Does every node see what the job's processes will read and write? Asked before anything is trained.

Ranks write their shards of one checkpoint into one directory and load the model from a path; a node
that lacks the mount fails in the middle of a job, or worse, writes to a directory of its own. So the
driver leaves a marker, and each node that could be given a worker is asked what it sees.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modeseek_ray.errors import StorageError

PATIENCE_S = 5.0  # a network file system may show a new file late


@dataclass(frozen=True)
class Shared:
    """What all nodes must see alike."""

    directory: Path  # of the job: they write into it, and it holds the marker
    marker: str  # name and content of the file that the driver wrote
    models: Mapping[Path, str]  # Hugging Face directory -> `fingerprint` as the driver sees it


@contextmanager
def marked(directory: Path, models: Sequence[Path]) -> Iterator[Shared]:
    """Leave a marker in `directory` as long as the block runs. Raises `StorageError` if it cannot be written."""
    marker = f".seen-{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / marker).write_text(marker)
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}.",
            file=str(directory),
            mend="Mend the permissions of MODESEEK_STORAGE (MODESEEK_HOME), or free some space.",
        ) from error
    try:
        yield Shared(directory, marker, {model: fingerprint(model) for model in models})
    finally:
        (directory / marker).unlink(missing_ok=True)


def fingerprint(model: Path) -> str:
    """Changes with the configuration and with names and sizes of the weight files; no weights are read.

    Raises `OSError` where there is no such model.
    """
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size};".encode())
    return digest.hexdigest()


def look(shared: Shared, patience_s: float = PATIENCE_S) -> str | None:
    """What is wrong as seen from this process, in words; None = nothing. Runs on each node."""
    marker = shared.directory / shared.marker
    ends = time.monotonic() + patience_s
    while not marker.is_file():
        if time.monotonic() > ends:
            return f"does not see {shared.directory}"
        time.sleep(0.2)
    try:
        own = marker.with_name(f"{marker.name}.{socket.gethostname()}")
        own.write_text(shared.marker)
        own.unlink()
    except OSError as error:
        return f"cannot write to {shared.directory} ({error.strerror})"
    for model, expected in shared.models.items():
        try:
            found = fingerprint(model)
        except OSError:
            return f"does not see the model {model}"
        if found != expected:
            return f"has another model at {model}"
    return None


def refuse_blind(findings: Mapping[str, str | None]) -> None:
    """`findings`: address of a node -> what `look` said there. Raises `StorageError` naming every bad node."""
    bad = {address: problem for address, problem in sorted(findings.items()) if problem is not None}
    if not bad:
        return
    listed = "; ".join(f"node {address} {problem}" for address, problem in bad.items())
    raise StorageError(
        f"{len(bad)} of {len(findings)} nodes cannot take a worker of this job: {listed}.",
        mend="All nodes must see MODESEEK_STORAGE (or MODESEEK_HOME) and the models at the same paths: mount the"
        " directory there, or take the node out of the cluster; then submit the job again.",
        code="storage_not_shared",
    )
