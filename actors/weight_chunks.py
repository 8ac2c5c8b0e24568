"""Weights on their way from the trainer to the engines: named tensors in flat buffers, checksummed.

Loads neither torch nor Ray. A chunk is one buffer, so that Ray's object store keeps it outside the
pickled part and every engine of a node reads the same shared memory, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64  # bytes: tensors begin where every dtype may, and whole cache lines are read


@dataclass(frozen=True)
class WeightChunk:
    """Some weights under their checkpoint names (those of `save_pretrained`)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # torch's names: "float32", "bfloat16"
    offsets: tuple[int, ...]  # where each begins in `data`, bytes
    data: NDArray[np.uint8]
    checksum: str  # of the bytes, with names, shapes and dtypes

    @classmethod
    def pack(cls, weights: Sequence[tuple[str, Tensor]]) -> WeightChunk:
        """Copy these tensors into one buffer; they may change afterwards."""
        import torch

        offsets, size = [], 0
        for _, tensor in weights:
            offsets.append(size)
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        data = np.zeros(size, dtype=np.uint8)
        buffer = torch.from_numpy(data)
        for offset, (_, tensor) in zip(offsets, weights, strict=True):
            num_bytes = tensor.numel() * tensor.element_size()
            target = buffer[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach())
        names = tuple(name for name, _ in weights)
        shapes = tuple(tuple(tensor.shape) for _, tensor in weights)
        dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in weights)
        return cls(names, shapes, dtypes, tuple(offsets), data, _checksum(names, shapes, dtypes, data))

    @property
    def num_bytes(self) -> int:
        return int(self.data.nbytes)

    def compute_checksum(self) -> str:
        """What `checksum` has to be."""
        return _checksum(self.names, self.shapes, self.dtypes, self.data)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, without a copy: to be read, never written to (the memory is shared)."""
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            buffer = torch.from_numpy(self.data)
        for name, shape, dtype, offset in zip(
            self.names, self.shapes, self.dtypes, self.offsets, strict=True
        ):
            kind = getattr(torch, dtype)
            num_bytes = math.prod(shape) * kind.itemsize
            yield name, buffer[offset : offset + num_bytes].view(kind).view(shape)


@dataclass(frozen=True)
class ChunkFacts:
    """What the driver is told about the chunks, whose bytes it never holds."""

    checksums: tuple[str, ...]
    num_bytes: int
    num_weights: int
    seconds: float  # gathering and packing, on rank 0


@dataclass(frozen=True)
class WeightRelease:
    """All weights of one version. `chunks` are what workers are handed: objects, or Ray references."""

    version: int
    chunks: tuple[Any, ...]
    checksum: str
    facts: ChunkFacts

    @classmethod
    def of(cls, version: int, chunks: Sequence[Any], facts: ChunkFacts) -> WeightRelease:
        """Raises `RuntimeError` when chunks were lost on the way."""
        if len(chunks) != len(facts.checksums):
            raise RuntimeError(f"{len(chunks)} chunks of weights came, {len(facts.checksums)} were packed")
        return cls(version, tuple(chunks), combine_checksums(facts.checksums), facts)


def combine_checksums(checksums: Sequence[str]) -> str:
    """One for all, in their order."""
    return blake3("\n".join(checksums).encode()).hexdigest(length=16)


def _checksum(*parts: Any) -> str:
    *described, data = parts
    digest = blake3(repr(described).encode())
    digest.update(data.data)
    return digest.hexdigest(length=16)
