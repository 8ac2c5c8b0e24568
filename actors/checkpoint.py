"""Checkpoints that are complete or not there: written aside, hashed, renamed; verified before use.

Order of a save, and why a crash at any point loses nothing that was there before:

1. `begin` checks the disk and makes `step-N.aK.tmp`; every rank writes its shard into it.
2. `finish` writes the driver's state, then flushes every file to the disk and records its size and
   SHA-256 in `manifest.json`, the last file to appear.
3. One atomic rename to `step-N.aK` makes it visible; flushing the parent directory makes it last.
4. Older checkpoints (`surplus`) are removed only when the new one is committed and the store has forgotten
   them, so that it lists none that is not there; and never fewer than two stay.

`latest` goes back from the newest and returns the first that verifies, so that a checkpoint damaged
later (a truncated shard, a bad disk) costs steps, not the job. DeepSpeed's own saves give none of
this: its shards go straight to their final names and a truncated one fails the load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.origin import differences
from modeseek_ray.errors import StorageError, cannot_write

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONTROLLER = "controller.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.a(\d+)")
_TEMPORARY = re.compile(r"step-(\d+)\.a(\d+)\.(?:tmp|old)")
_CHUNK_BYTES = 1 << 20


class CheckpointStore:
    """The checkpoints of one job under `root`. One writer at a time: the driver of the newest attempt."""

    def __init__(
        self,
        root: Path,
        keep: int = 2,
        *,
        expected_bytes: int = 0,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """`expected_bytes`: what a checkpoint will take before the first one has shown it; `origin`: `origin.py`."""
        self._root = Path(root)
        self._keep = max(2, keep)
        self._expected_bytes = expected_bytes
        self._origin = dict(origin or {})

    def begin(self, step: int, attempt: int) -> Path:
        """Make the directory the ranks write into. Raises `StorageError` when the disk is too full for it."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers(attempt)
            self._check_space()
            directory = self._root / f"step-{step}.a{attempt}.tmp"
            directory.mkdir()
        except OSError as error:
            raise _cannot_write(self._root, error) from error
        return directory

    def finish(self, directory: Path, controller: Mapping[str, Any]) -> Path:
        """Seal what the ranks wrote into `directory` (from `begin`) and make it visible. Returns where it is now.

        Await every rank's `save` first: a file still being written would be hashed half.
        """
        match = _TEMPORARY.fullmatch(directory.name)
        if match is None:
            raise ValueError(f"{directory} was not made by begin()")
        step, attempt = int(match[1]), int(match[2])
        target = self._root / f"step-{step}.a{attempt}"
        try:
            _write_json(directory / CONTROLLER, controller)
            files = {path.relative_to(directory).as_posix(): _flush(path) for path in _files(directory)}
            facts = {"format": _FORMAT, "step": step, "attempt": attempt, "origin": self._origin}
            _write_json(directory / MANIFEST, {**facts, "files": files})
            for folder in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
                _flush_directory(folder)
            if target.exists():  # the same step saved twice in one attempt: swap, never overwrite in place
                os.replace(target, target.with_name(target.name + ".old"))
            os.replace(directory, target)
            _flush_directory(self._root)
        except OSError as error:
            raise _cannot_write(directory, error) from error
        return target

    def all(self) -> list[Path]:
        """Checkpoints that were finished, newest first. Not verified."""
        if not self._root.is_dir():
            return []
        found = [(int(m[1]), int(m[2]), p) for p in self._root.iterdir() if (m := _NAME.fullmatch(p.name))]
        return [path for _, _, path in sorted(found, reverse=True)]

    def forget_uncommitted(self, committed: Path | None) -> None:
        """Remove what is newer than `committed`, the newest checkpoint that the job's history knows.

        Such a checkpoint is complete, but a crash came between its rename and its commit, and with it
        the events before it may be lost: resumed from there, history would have a gap. Call before
        `latest`, where a store keeps the history.
        """
        for path in self.all():
            if committed is None or _age(path) > _age(committed):
                log.warning("checkpoint %s was never committed; going back behind it", path.name)
                self._remove(path)

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are passed over with a warning."""
        for path in self.all():
            try:
                self.verify(path)
            except StorageError as error:
                log.warning("checkpoint passed over: %s", error)
            else:
                return path
        return None

    def verify(self, directory: Path) -> None:
        """Compare every file with the manifest. Raises `StorageError` naming the first that differs."""
        for name, entry in _manifest(directory)["files"].items():
            path = directory / name
            try:
                size, sha256 = path.stat().st_size, _sha256(path)
            except OSError as error:
                raise _damaged(directory, f"{name} cannot be read ({error.strerror})") from error
            if size != entry["bytes"]:
                raise _damaged(directory, f"{name} has {size} bytes instead of {entry['bytes']}")
            if sha256 != entry["sha256"]:
                raise _damaged(directory, f"{name} does not have the recorded SHA-256")

    def read_controller(self, directory: Path) -> dict[str, Any]:
        """The driver's state as it was handed to `finish`."""
        state: dict[str, Any] = json.loads((directory / CONTROLLER).read_text(encoding="utf-8"))
        return state

    def differences(self, directory: Path) -> list[str]:
        """In what the checkpoint was written by something else than what runs now."""
        return differences(_manifest(directory).get("origin", {}), self._origin)

    def _check_space(self) -> None:
        newest = self.all()[:1]
        needed = max([self._expected_bytes, *(sum(p.stat().st_size for p in _files(n)) for n in newest)])
        free = shutil.disk_usage(self._root).free
        if free < needed:
            raise StorageError(
                f"a checkpoint needs {needed:,} bytes, {free:,} are free.",
                file=str(self._root),
                mend="Free some space, or lower training.keep_checkpoints; the newest checkpoint is untouched.",
                code="disk_full",
            )

    def _remove_leftovers(self, attempt: int) -> None:
        """Half-written directories of this and earlier attempts: nobody will finish them."""
        for path in self._root.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and int(match[2]) <= attempt:
                shutil.rmtree(path)

    def surplus(self) -> list[Path]:
        """Checkpoints beyond those to keep. Whoever lists them has to forget them before they are removed."""
        return self.all()[self._keep :]

    def remove(self, surplus: Sequence[Path]) -> None:
        """Delete these, and what a crash left of earlier removals."""
        for path in [*surplus, *self._root.glob("step-*.a*.old")]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first, so that a crash in the middle of removing leaves no half checkpoint behind.
        doomed = path if path.suffix == ".old" else path.with_name(path.name + ".old")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _age(path: Path) -> tuple[int, int]:
    """(step, attempt): later checkpoints compare greater."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint")
    return int(match[1]), int(match[2])


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{MANIFEST} cannot be read ({error})") from error
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("files"), dict):
        raise _damaged(directory, f"{MANIFEST} is not of format {_FORMAT}")
    return manifest


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _damaged(directory: Path, what: str) -> StorageError:
    return StorageError(
        f"the checkpoint is damaged: {what}.",
        file=str(directory),
        mend="Go on from an older one; this one can be removed.",
    )


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return cannot_write("the checkpoint", path, error, kept="earlier checkpoints are")
