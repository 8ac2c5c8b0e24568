"""Which rows are compared with each other: those of one prompt, or the whole batch.

N  rows      S  segments (prompts, or one for the whole batch)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.types import FloatArray, IntArray

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Scope:
    """Segmented statistics, prior-weighted: a row of prior 2 counts like the same row twice.

    >>> Scope.of(np.array([7, 7, 9]), np.ones(3)).mean(np.array([0., 1., 5.]))
    array([0.5, 5. ])
    """

    segment_N: IntArray  # 0 .. S-1
    prior_N: FloatArray

    @classmethod
    def of(cls, group_N: IntArray, prior_N: FloatArray) -> Scope:
        """Rows with equal group numbers share a segment."""
        return cls(np.unique(group_N, return_inverse=True)[1].astype(np.int64), prior_N)

    @classmethod
    def batch(cls, prior_N: FloatArray) -> Scope:
        """One segment."""
        return cls(np.zeros(len(prior_N), np.int64), prior_N)

    @cached_property
    def size(self) -> int:
        return int(self.segment_N.max(initial=-1)) + 1

    @cached_property
    def count_S(self) -> IntArray:
        return np.bincount(self.segment_N, minlength=self.size)

    @cached_property
    def mass_S(self) -> FloatArray:
        """Prior mass of each segment, 1 where it is zero, so that means stay finite."""
        mass_S = np.bincount(self.segment_N, weights=self.prior_N, minlength=self.size)
        return np.where(mass_S > 0, mass_S, 1.0)

    def spread(self, x_S: NDArray[Number]) -> NDArray[Number]:
        """Hand a segment's value to each of its rows."""
        return x_S[self.segment_N]

    def mean(self, x_N: FloatArray) -> FloatArray:
        """Prior-weighted mean of each segment."""
        return np.bincount(self.segment_N, weights=self.prior_N * x_N, minlength=self.size) / self.mass_S

    def std(self, x_N: FloatArray) -> FloatArray:
        """Prior-weighted population standard deviation of each segment."""
        centred_N = x_N - self.spread(self.mean(x_N))
        return np.sqrt(self.mean(centred_N * centred_N))

    def max(self, x_N: FloatArray) -> FloatArray:
        """Largest value of each segment among rows of positive prior; -inf where there is none."""
        most_S = np.full(self.size, -np.inf)
        np.maximum.at(most_S, self.segment_N, np.where(self.prior_N > 0, x_N, -np.inf))
        return most_S

    def min(self, x_N: FloatArray) -> FloatArray:
        """Smallest value of each segment among rows of positive prior."""
        return -self.max(-x_N)

    def counts_at_most(self, x_N: FloatArray) -> tuple[IntArray, IntArray]:
        """For each row, how many rows of its segment are at most, and how many are below, its value."""
        order_N = np.lexsort((x_N, self.segment_N))
        segment_N, sorted_N = self.segment_N[order_N], x_N[order_N]
        start_S = np.concatenate([[0], np.cumsum(self.count_S)[:-1]])
        new_run_N = np.ones(len(x_N), bool)
        new_run_N[1:] = (segment_N[1:] != segment_N[:-1]) | (sorted_N[1:] != sorted_N[:-1])
        first_R = np.flatnonzero(new_run_N)
        run_N = np.cumsum(new_run_N) - 1
        past_R = np.append(first_R[1:], len(x_N))
        at_most_N, below_N = np.empty(len(x_N), np.int64), np.empty(len(x_N), np.int64)
        at_most_N[order_N] = past_R[run_N] - start_S[segment_N]
        below_N[order_N] = first_R[run_N] - start_S[segment_N]
        return at_most_N, below_N
