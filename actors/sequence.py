"""Ranks that share their samples: each computes a contiguous part of every sequence, for samples too long for one.

    S  positions of a micro-batch, padding included     C  = S / ranks, one rank's     B  its samples
    M  its trained tokens                               m  those of them that one rank predicts

Everything in a transformer but attention works on a position by itself. So a rank computes its columns,
attention exchanges heads for sequence (`ulysses.py`), and what is known per token is put together right
behind the model: whatever comes after (loss, clipping, figures, what a batch was begun with) sees whole
samples on every rank of the group and need not know of parts. The loss, too, is the whole one on every
rank; its gradient takes only the way of the rank's own tokens, so that the ranks' gradients still add up
to the batch's. A group of one rank is a rank as ever: nothing is exchanged and nothing copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modeseek_ray.objectives.collate import Batch
from modeseek_ray.objectives.logprobs import TokenScores
from modeseek_ray.types import IntArray


class SequenceGroup:
    """The `size` neighbouring ranks one of which this is. `index` says which: the first has the first columns."""

    def __init__(self, size: int, rank: int, world_size: int, timeout: timedelta) -> None:
        """Collective over all ranks, after they have joined. `size` divides `world_size`."""
        self.size = size
        self.index = rank % size
        self.process_group: Any = None
        if size == 1:
            return
        for first in range(0, world_size, size):  # every rank helps to make every group
            ranks = list(range(first, first + size))
            made = torch.distributed.new_group(ranks, timeout=timeout)
            if rank in ranks:
                self.process_group = made

    def columns(self, length: int) -> slice:
        """This rank's share of `length` positions, which are a multiple of `size`."""
        own = length // self.size
        return slice(self.index * own, (self.index + 1) * own)

    def part(self, batch: Batch) -> Part:
        """This rank's part of a micro-batch that was padded to a multiple of `size`."""
        if self.size == 1:
            return Part(self, batch, batch)
        length = batch.input_ids_BS.shape[1]
        columns = self.columns(length)
        row_M, column_M = batch.positions_M // length, batch.positions_M % length
        index_m = ((column_M >= columns.start) & (column_M < columns.stop)).nonzero().flatten()
        own_length = columns.stop - columns.start
        own = replace(
            batch,
            input_ids_BS=batch.input_ids_BS[:, columns].contiguous(),
            attention_mask_BS=batch.attention_mask_BS[:, columns].contiguous(),
            positions_M=(row_M * own_length + column_M - columns.start)[index_m],
            target_M=batch.target_M[index_m],
            sample_M=batch.sample_M[index_m],
            log_behavior_M=None if batch.log_behavior_M is None else batch.log_behavior_M[index_m],
        )
        return Part(self, batch, own, index_m)

    def total(self, counts_L: Sequence[IntArray], device: torch.device) -> tuple[IntArray, ...]:
        """Counts added up over the group. Collective."""
        if self.size == 1 or not counts_L:
            return tuple(counts_L)
        counts = torch.from_numpy(np.concatenate(counts_L)).to(device)
        torch.distributed.all_reduce(counts, group=self.process_group)
        return tuple(np.split(counts.cpu().numpy(), np.cumsum([len(c) for c in counts_L])[:-1]))

    def assemble(self, own_n: Tensor, index_n: Tensor, size: int) -> Tensor:
        """`[size, …]` on every rank of the group, of the rows that each has, at `index_n`. Collective."""
        whole: Tensor = _Assemble.apply(own_n, index_n, size, self.process_group)
        return whole


@dataclass(frozen=True)
class Part:
    """One rank's columns of a micro-batch. What puts things together is collective over the group."""

    group: SequenceGroup
    whole: Batch
    own: Batch  # the same samples, C columns and m tokens of them; `num_tokens_B` are still the samples'
    index_m: Tensor | None = None  # which of the M tokens are its; None = all

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Arguments of `ScoringModel`. A part has no padding mask: under a causal mask what stands right of the
        last token reaches none of the tokens, and without it attention need not hold a mask at all."""
        own = self.own
        if self.index_m is None:
            return own.input_ids_BS, own.attention_mask_BS, own.positions_M, own.target_M
        columns = self.group.columns(self.whole.input_ids_BS.shape[1])
        position_C = torch.arange(columns.start, columns.stop, device=own.input_ids_BS.device)
        return (
            own.input_ids_BS,
            None,
            own.positions_M,
            own.target_M,
            position_C.expand_as(own.input_ids_BS),
        )

    def scores(self, own: TokenScores) -> TokenScores:
        """Of all M tokens, from each rank's m. Only what carried gradients does, to the rank's own tokens."""
        if self.index_m is None:
            return own
        columns = {name: value for name, value in own._asdict().items() if value is not None}
        hidden_mD = columns.pop("hidden_M", None)
        stacked_mX = torch.stack([column_m.float() for column_m in columns.values()], dim=1)
        found = dict(zip(columns, self.tokens(stacked_mX).unbind(1), strict=True))
        found["correct_M"] = found["correct_M"] > 0.5
        hidden_MD = None if hidden_mD is None else self.tokens(hidden_mD)
        return TokenScores(**found, hidden_M=hidden_MD)

    def tokens(self, own_m: Tensor) -> Tensor:
        """`[M, …]` from each rank's `[m, …]`."""
        if self.index_m is None:
            return own_m
        return self.group.assemble(own_m, self.index_m, len(self.whole.target_M))

    def of_tokens(self, whole_M: Tensor) -> Tensor:
        """This rank's rows of `[M, …]`."""
        return whole_M if self.index_m is None else whole_M[self.index_m]

    def positions(self, own_n: Tensor) -> Tensor:
        """`[B * S, …]` from each rank's `[B * C, …]`."""
        if self.index_m is None:
            return own_n
        samples, length = self.whole.input_ids_BS.shape
        index_BS = torch.arange(samples * length, device=own_n.device).view(samples, length)
        index_n = index_BS[:, self.group.columns(length)].flatten()
        return self.group.assemble(own_n, index_n, samples * length)

    def of_routes(self, routes_BSLK: NDArray[np.int16]) -> NDArray[np.int16]:
        """The routes of this rank's columns."""
        return (
            routes_BSLK if self.index_m is None else routes_BSLK[:, self.group.columns(routes_BSLK.shape[1])]
        )

    def routes(self, own_BCLK: NDArray[np.int16]) -> NDArray[np.int16]:
        """`[B, S, L, K]` from each rank's columns."""
        if self.index_m is None:
            return own_BCLK
        samples, _, *sizes = own_BCLK.shape
        own_n = torch.from_numpy(own_BCLK.astype(np.int32)).flatten(0, 1).to(self.own.input_ids_BS.device)
        return self.positions(own_n).cpu().numpy().astype(np.int16).reshape(samples, -1, *sizes)


class _Assemble(torch.autograd.Function):
    """Rows that lie on several ranks, on all of them. Each row has one owner, so that a sum with zeros is exact."""

    @staticmethod
    def forward(ctx: Any, own_n: Tensor, index_n: Tensor, size: int, group: Any) -> Tensor:
        ctx.save_for_backward(index_n)
        whole = own_n.new_zeros(size, *own_n.shape[1:])
        whole[index_n] = own_n
        torch.distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """No sum over the group: all of its ranks compute the same loss, and each answers for its own rows."""
        (index_n,) = ctx.saved_tensors
        return grad[index_n], None, None, None
