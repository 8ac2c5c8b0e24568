"""Tensors that are read a few times in a job's life: in a file meanwhile, not in memory."""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    offset: int
    num_bytes: int
    dtype: torch.dtype


class Shelf:
    """Flat tensors by name, in a temporary file without a name, which is gone when this process is.

    What the file system has no room for stays in memory, and is said in the log.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this object is)
        self._places: dict[str, _Place] = {}
        self._in_memory: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a flat tensor, whatever device it is on."""
        flat = tensor.detach().cpu().contiguous()
        data = flat.view(torch.uint8).numpy().data
        offset = self._file.seek(0, 2)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            log.warning("%s is kept in memory: no room for it in %s (%s)", name, tempfile.gettempdir(), error)
            with suppress(OSError):
                self._file.truncate(offset)
            self._in_memory[name] = flat.clone()
            return
        self._places[name] = _Place(offset, data.nbytes, flat.dtype)

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Raises `KeyError` for one that was never put here."""
        if name in self._in_memory:
            return self._in_memory[name]
        place = self._places[name]
        data = torch.empty(place.num_bytes, dtype=torch.uint8)
        self._file.seek(place.offset)
        read = self._file.readinto(data.numpy().data)  # type: ignore[attr-defined]
        if read != place.num_bytes:
            raise OSError(f"{name}: {read} of {place.num_bytes} bytes came back from the temporary file")
        return data.view(place.dtype)
