"""A job's rows as columns: what the driver sees, with the tokens behind handles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.types import BoolArray, FloatArray, Group, Handle, IntArray, Sample


@dataclass(frozen=True, init=False)
class Dataset:
    """Training rows followed by replay rows: one entry per sample in every column.

    `group_N` numbers groups anew over both files: rows of one prompt share a number, a row without
    a group and every replay row has one of its own. `rewards_N` has NaN where a row has no reward
    and is None if no row has one; `log_behavior_N` is None unless every new row has it, and NaN for
    replay rows without it.

    >>> s = Sample(0, np.array([1, 2], dtype=np.int32), np.array([False, True]))
    >>> Dataset([s, s], replay=[s]).is_replay_N.tolist()
    [False, False, True]
    """

    samples: list[Sample]
    row_N: IntArray
    num_tokens_N: IntArray
    length_N: IntArray
    prior_N: FloatArray
    group_N: IntArray
    is_replay_N: BoolArray
    rewards_N: FloatArray | None
    log_behavior_N: FloatArray | None
    log_reference_N: FloatArray | None

    def __init__(self, samples: Sequence[Sample], replay: Sequence[Sample] = ()) -> None:
        both = [*samples, *replay]
        is_replay_N = np.arange(len(both)) >= len(samples)
        rewards_N = _optional([s.reward for s in both])
        log_behavior_N = _optional([s.log_behavior for s in both])
        columns = {
            "samples": both,
            "row_N": np.array([s.row for s in both], dtype=np.int64),
            "num_tokens_N": np.array([s.num_tokens for s in both], dtype=np.int64),
            "length_N": np.array([s.length for s in both], dtype=np.int64),
            "prior_N": np.array([s.prior for s in both], dtype=np.float64),
            "group_N": _number_groups(np.array([s.group for s in both], dtype=np.int64), is_replay_N),
            "is_replay_N": is_replay_N,
            "rewards_N": None if np.isnan(rewards_N).all() else rewards_N,
            "log_behavior_N": None if np.isnan(log_behavior_N[~is_replay_N]).any() else log_behavior_N,
            "log_reference_N": None,
        }
        for name, column in columns.items():
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_new(self) -> int:
        """Rows that are not replay."""
        return int((~self.is_replay_N).sum())

    @property
    def largest_group(self) -> int:
        """Most new rows of one prompt: what a batch has to hold."""
        return int(np.bincount(self.group_N[~self.is_replay_N]).max(initial=0))

    @property
    def median_initial_nll(self) -> float | None:
        """Median over new rows of the mean NLL per trained token under the start, nats; None before it is scored."""
        if self.log_reference_N is None or not self.num_new:
            return None
        new_N = ~self.is_replay_N
        return float(np.median(-self.log_reference_N[new_N] / self.num_tokens_N[new_N]))

    def all_indices(self) -> IntArray:
        return np.arange(len(self.samples))

    def with_columns(self, **columns: FloatArray) -> Dataset:
        """A copy with some columns filled in; each has one entry per sample."""
        for name, column in columns.items():
            if len(column) != len(self):
                raise ValueError(f"{name} has {len(column)} entries for {len(self)} samples")
        copy = object.__new__(Dataset)
        copy.__dict__.update(self.__dict__, **columns)
        return copy

    def with_start_routes(self, routes_N: Sequence[NDArray[Any]]) -> Dataset:
        """A copy whose samples carry the experts that pi_0 asks, one entry per sample."""
        copy = object.__new__(Dataset)
        samples = [replace(s, start_routes_TLK=r) for s, r in zip(self.samples, routes_N, strict=True)]
        copy.__dict__.update(self.__dict__, samples=samples)
        return copy

    def groups(self, index_N: IntArray, block: Any) -> list[Group]:
        """Samples `index_N` as groups, all samples of one prompt in one group.

        `block` holds those samples in that order; the groups' handles point into it. Groups come in
        order of first appearance.
        """
        if len(index_N) == 0:
            return []
        _, first_N, inverse_N = np.unique(self.group_N[index_N], return_index=True, return_inverse=True)
        rank_N = np.argsort(np.argsort(first_N))[inverse_N]
        order_N = np.argsort(rank_N, kind="stable")
        cuts = np.flatnonzero(np.diff(rank_N[order_N])) + 1
        return [self._group(index_N[position], position, block) for position in np.split(order_N, cuts)]

    def _group(self, index_N: IntArray, position_N: IntArray, block: Any) -> Group:
        def pick(column_N: FloatArray | None) -> FloatArray | None:
            return None if column_N is None else column_N[index_N]

        group = Group(
            prompt=int(self.group_N[index_N[0]]),
            row_N=self.row_N[index_N],
            num_tokens_N=self.num_tokens_N[index_N],
            length_N=self.length_N[index_N],
            payload=Handle(block=block, index_N=position_N),
            prior_N=self.prior_N[index_N],
            is_replay_N=self.is_replay_N[index_N],
        )
        return replace(
            group,
            rewards_N=pick(self.rewards_N),
            log_behavior_N=pick(self.log_behavior_N),
            log_reference_N=pick(self.log_reference_N),
        )


def _optional(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _number_groups(given_N: IntArray, is_replay_N: BoolArray) -> IntArray:
    """Dense numbers by first appearance, one for each row that stands alone."""
    alone_N = (given_N < 0) | is_replay_N
    key_N = np.where(alone_N, -1 - np.arange(len(given_N)), given_N)
    _, first_N, inverse_N = np.unique(key_N, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_N))[inverse_N].astype(np.int64)
