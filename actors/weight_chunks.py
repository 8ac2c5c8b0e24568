"""Weights on their way from the trainer to the engines: named tensors as plain bytes, checksummed.

Loads neither torch nor Ray. A chunk is a few arrays of bytes, which Ray's object store copies from
where they are, once, and which every engine of a node then reads in the same shared memory.

The checksum is there for what goes wrong by itself: memory that was freed or written to too early, a
tensor that is missing, doubled or another one's. So it is XXH3, which reads memory as fast as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightChunk:
    """Some weights under their checkpoint names (those of `save_pretrained`)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # torch's names: "float32", "bfloat16"
    data: tuple[NDArray[np.uint8], ...]  # the bytes of each
    checksum: str  # of the bytes, with names, shapes and dtypes

    @classmethod
    def pack(cls, weights: Sequence[tuple[str, Tensor]], *, copy: bool = True) -> WeightChunk:
        """These tensors' bytes. Without `copy` they are the live ones, wherever they lie on the CPU and in
        one piece: for whoever hands the chunk on before they change."""
        import torch

        data = []
        for _, tensor in weights:
            value = tensor.detach()
            plain = value.cpu().contiguous()
            if copy and plain.data_ptr() == value.data_ptr():
                plain = plain.clone()
            data.append(plain.view(-1).view(torch.uint8).numpy())
        names = tuple(name for name, _ in weights)
        shapes = tuple(tuple(tensor.shape) for _, tensor in weights)
        dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in weights)
        return cls(names, shapes, dtypes, tuple(data), _checksum(names, shapes, dtypes, data))

    @property
    def num_bytes(self) -> int:
        return sum(int(part.nbytes) for part in self.data)

    def compute_checksum(self) -> str:
        """What `checksum` has to be."""
        return _checksum(self.names, self.shapes, self.dtypes, self.data)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, without a copy: to be read, never written to (the memory is shared)."""
        import warnings

        import torch

        for name, shape, dtype, part in zip(self.names, self.shapes, self.dtypes, self.data, strict=True):
            kind = getattr(torch, dtype)
            if part.nbytes != math.prod(shape) * kind.itemsize:
                raise ValueError(f"{name} has {part.nbytes} bytes, its shape is {shape} in {dtype}")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                buffer = torch.from_numpy(part)
            yield name, buffer.view(kind).view(shape)


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
    return xxh3_128("\n".join(checksums).encode()).hexdigest()


def _checksum(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    data: Sequence[NDArray[np.uint8]],
) -> str:
    digest = xxh3_128(repr((tuple(names), tuple(shapes), tuple(dtypes))).encode())
    for part in data:
        digest.update(part.data)
    return digest.hexdigest()
