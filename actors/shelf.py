"""Tensors that are read a few times in a job's life: in a file meanwhile, not in memory."""

from __future__ import annotations

import logging
import shutil
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Of the file system, that is left to others: Ray stops working on one that is fuller than 95 %.
LEFT_FREE = 0.1


class _Place(NamedTuple):
    offset: int
    num_bytes: int
    dtype: torch.dtype


class Shelf:
    """Flat tensors by name, in a temporary file without a name, which is gone when this process is.

    What there is no room for stays in memory, and that is said in the log. The directory is Python's (`TMPDIR`).
    """

    def __init__(self) -> None:
        # Unbuffered: what a full disk refuses must not wait in a buffer and be refused again later.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as this object is)
        self._end = 0
        self._places: dict[str, _Place] = {}
        self._in_memory: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a flat tensor, whatever device it is on."""
        flat = tensor.detach().cpu().contiguous()
        data = flat.view(torch.uint8).numpy().data
        try:
            self._write(data)
        except OSError as error:
            where = tempfile.gettempdir()
            log.warning("%s is kept in memory: %s has no room for it (%s)", name, where, error)
            self._in_memory[name] = flat.clone()
        else:
            self._places[name] = _Place(self._end, data.nbytes, flat.dtype)
            self._end += data.nbytes

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Raises `KeyError` for one that was never put here."""
        if name in self._in_memory:
            return self._in_memory[name]
        place = self._places[name]
        data = torch.empty(place.num_bytes, dtype=torch.uint8)
        rest = data.numpy().data
        self._file.seek(place.offset)
        while rest:
            count = self._file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{name}: the last {len(rest)} bytes are missing in the temporary file")
            rest = rest[count:]
        return data.view(place.dtype)

    def _write(self, data: memoryview) -> None:
        """Behind what is there. Raises `OSError`, and what has got there is written over by the next."""
        usage = shutil.disk_usage(tempfile.gettempdir())
        if usage.free - data.nbytes < LEFT_FREE * usage.total:
            raise OSError(f"{usage.free:,} bytes free of {usage.total:,}, {data.nbytes:,} more wanted")
        self._file.seek(self._end)
        while data:
            data = data[self._file.write(data) :]
