"""Logits of a vocabulary projection a chunk of positions at a time, and the gradients they send back.

    M  positions      H or D  width of the model      C  positions of one chunk      V  vocabulary

Logits and everything made of them are float32 whatever the model's dtype. What is multiplied need not be:
the product of two bfloat16 numbers is exact in float32, so a GPU's matrix units, which add up in float32,
give of bfloat16 hidden states and weights what a float32 product of their copies gives, at some ten times
its rate. On the way back one factor, d loss / d logits, is float32. It is multiplied as the sum of two
bfloat16 numbers, which keeps 16 bits of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of float32 logits: large enough for an efficient product, small beside a model. The weights are read again
# for every chunk, and a GPU multiplies faster than it reads.
CHUNK_BYTES, CHUNK_BYTES_ON_GPU = 64 * 2**20, 512 * 2**20
# Of those, what is looked at in one go; its exponentials take as much memory again. Much smaller blocks would
# fit a cache, but threads that wait for each other after every small kernel lose more where a machine is shared.
BLOCK_BYTES, BLOCK_BYTES_ON_GPU = 16 * 2**20, 64 * 2**20
# Chunks that forward passes keep, so that their backward passes need not compute them again, over all graphs of a
# process: all of a small vocabulary's, none on a GPU, whose memory is worth more than the product.
KEPT_BYTES, KEPT_BYTES_ON_GPU = 256 * 2**20, 0


@dataclass(frozen=True)
class Head:
    """A vocabulary projection: logits = scale * (hidden @ weight.T + bias).

    `scale` is 1 / temperature times whatever constant the architecture multiplies its logits by.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0


def default_chunk(weight_VD: Tensor) -> int:
    """Positions whose float32 logits fit the chunk of the weight's device."""
    num_bytes = CHUNK_BYTES_ON_GPU if weight_VD.is_cuda else CHUNK_BYTES
    return max(1, num_bytes // (4 * len(weight_VD)))


def block_rows(logits_CV: Tensor) -> int:
    """Positions of one block."""
    num_bytes = BLOCK_BYTES_ON_GPU if logits_CV.is_cuda else BLOCK_BYTES
    return max(1, num_bytes // (4 * logits_CV.shape[1]))


def parts(num_positions: int, size: int) -> Iterator[slice]:
    """Chunks of `size` positions, the last one perhaps shorter."""
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


class Logits:
    """Float32 logits of a head, a chunk of positions at a time, in one buffer that is used again."""

    def __init__(self, hidden_MD: Tensor, head: Head, size: int) -> None:
        self.hidden_MD = hidden_MD
        self.as_stored = multiplies_as_stored(hidden_MD, head.weight_VD)
        self.weight_VD = head.weight_VD if self.as_stored else head.weight_VD.float()
        self.bias_V = None if head.bias_V is None else head.bias_V.float() * head.scale
        self.scale = head.scale
        rows = min(size, len(hidden_MD))
        self.buffer_CV = torch.empty(rows, len(self.weight_VD), dtype=torch.float32, device=hidden_MD.device)

    def hidden(self, part: slice) -> Tensor:
        """The chunk's hidden states. In float32, the logits' scale is in them."""
        hidden_CD = self.hidden_MD[part]
        if self.as_stored:
            return hidden_CD
        return hidden_CD.float() if self.scale == 1.0 else hidden_CD.float() * self.scale

    def __call__(self, part: slice) -> Tensor:
        """Logits of one chunk. Valid until the next call; callers may overwrite them."""
        hidden_CD = self.hidden(part)
        logits_CV = self.buffer_CV[: len(hidden_CD)]
        if self.as_stored:
            _multiply(hidden_CD, self.weight_VD.t(), logits_CV)
            if self.scale != 1.0:
                logits_CV.mul_(self.scale)
        else:
            torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
        return logits_CV if self.bias_V is None else logits_CV.add_(self.bias_V)


class Kept:
    """Chunks of one graph that wait for its backward pass, as far as the process's other graphs leave room."""

    _bytes_of_all = 0

    def __init__(self) -> None:
        self._chunks: dict[int, Tensor] = {}
        self._bytes = 0

    def room_for(self, start: int, like_CV: Tensor) -> Tensor | None:
        """An empty chunk, in which the one that begins at position `start` will be found; None where it is too much."""
        limit = KEPT_BYTES_ON_GPU if like_CV.is_cuda else KEPT_BYTES
        if Kept._bytes_of_all + like_CV.nbytes > limit:
            return None
        self._count(like_CV.nbytes)
        self._chunks[start] = torch.empty_like(like_CV)
        return self._chunks[start]

    def take(self, start: int) -> Tensor | None:
        """The chunk, once."""
        found = self._chunks.pop(start, None)
        if found is not None:
            self._count(-found.nbytes)
        return found

    def __del__(self) -> None:
        """A graph may be dropped without a backward pass."""
        self._count(-self._bytes)

    def _count(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        Kept._bytes_of_all += num_bytes


class Gradients:
    """Sums d loss / d logits of the chunks up to gradients of hidden, weight and bias."""

    def __init__(self, logits: Logits, needed: tuple[bool, bool, bool]) -> None:
        self.logits = logits
        new = logits.buffer_CV.new_empty
        self.hidden_MD = new(logits.hidden_MD.shape) if needed[0] else None
        self.weight_VD = new(logits.weight_VD.shape).zero_() if needed[1] else None
        self.bias_V = new(len(logits.weight_VD)).zero_() if needed[2] else None
        self._halves_2CV = None
        if logits.as_stored:
            rows, vocabulary = logits.buffer_CV.shape
            self._halves_2CV = new((2 * rows, vocabulary), dtype=torch.bfloat16)

    def add(self, part: slice, grad_CV: Tensor) -> None:
        """`grad_CV` is d loss / d logits of one chunk; it is overwritten."""
        if self.bias_V is not None:
            self.bias_V.add_(grad_CV.sum(0), alpha=self.logits.scale)
        if self._halves_2CV is not None:
            self._add_halves(part, grad_CV, self._halves_2CV[: 2 * len(grad_CV)])
            return
        if self.hidden_MD is not None:
            torch.mm(grad_CV, self.logits.weight_VD, out=self.hidden_MD[part])
        if self.weight_VD is not None:
            self.weight_VD.addmm_(grad_CV.t(), self.logits.hidden(part))

    def _add_halves(self, part: slice, grad_CV: Tensor, halves_2CV: Tensor) -> None:
        """The same with `grad_CV` as its bfloat16 value and, in bfloat16 again, what that leaves."""
        count = len(grad_CV)
        high_CV, low_CV = halves_2CV[:count], halves_2CV[count:]
        low_CV.copy_(grad_CV.sub_(high_CV.copy_(grad_CV)))
        if self.hidden_MD is not None:
            sides_2CD = self.hidden_MD.new_empty(2 * count, self.hidden_MD.shape[1])
            _multiply(halves_2CV, self.logits.weight_VD, sides_2CD)
            torch.add(sides_2CD[:count], sides_2CD[count:], out=self.hidden_MD[part])
        if self.weight_VD is not None:
            _multiply_add(self.weight_VD, halves_2CV.t(), self.logits.hidden(part).repeat(2, 1))

    def result(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """The three gradients in their parameters' dtypes."""
        if self.logits.scale != 1.0:
            if self.hidden_MD is not None:
                self.hidden_MD.mul_(self.logits.scale)
            if self.weight_VD is not None and self.logits.as_stored:
                self.weight_VD.mul_(self.logits.scale)
        return (
            None if self.hidden_MD is None else self.hidden_MD.to(hidden.dtype),
            None if self.weight_VD is None else self.weight_VD.to(weight.dtype),
            None if self.bias_V is None or bias is None else self.bias_V.to(bias.dtype),
        )


def multiplies_as_stored(hidden_MD: Tensor, weight_VD: Tensor) -> bool:
    """Whether both are bfloat16 where products of such come out in float32."""
    return weight_VD.is_cuda and hidden_MD.dtype == weight_VD.dtype == torch.bfloat16


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Product of bfloat16 matrices in float32. torch has that kernel on GPUs alone."""
    if left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def _multiply_add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add such a product to `total`."""
    if left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
