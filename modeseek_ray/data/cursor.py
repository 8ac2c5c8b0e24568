"""In which order the rows of a data set are trained on, resumable at any step.

The order is a pure function of (seed, step): each epoch's shuffle has a generator of its own,
seeded by (seed, stream, epoch), and the cut into batches is counted, not accumulated. So the state
is one number, and restoring costs one shuffle wherever the job stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from modeseek_ray.errors import ConfigError, StorageError
from modeseek_ray.types import BoolArray, IntArray

_TRAINING, _REPLAY = 0, 1  # streams of the generator


class Cursor(Iterator[IntArray]):
    """Yields one array of sample indices per global batch.

    Indices are positions in `group_N` and `is_replay_N` (None = no replay rows). Within an epoch
    every row that is not replay appears exactly once.

    * Groups (equal numbers in `group_N`; -1 is a group of its own) are shuffled as wholes and never
      split. Batch k of an epoch ends at the last group boundary at or before k x batch_size, so
      batches have `batch_size` samples on average and differ from it by less than a group.
    * The last, smaller batch of an epoch is kept: every row counts once per epoch, and an epoch
      always has the same number of steps.
    * Replay rows take `replay_share` of the batch (exactly so in the long run: the count is rounded
      cumulatively) and come from an endless shuffle of their own; their groups are not kept together.

    Raises ConfigError if a group does not fit into a batch or nothing is left beside replay.

    >>> cursor = Cursor(np.full(10, -1), batch_size=4, seed=0, epochs=2)
    >>> cursor.num_steps, [len(batch) for batch in cursor]
    (6, [4, 4, 2, 4, 4, 2])
    """

    def __init__(
        self,
        group_N: IntArray,
        batch_size: int,
        *,
        seed: int,
        epochs: int | None = None,
        max_steps: int | None = None,
        is_replay_N: BoolArray | None = None,
        replay_share: float = 0.0,
    ) -> None:
        if epochs is None and max_steps is None:
            raise ConfigError(
                "neither epochs nor max_steps is given.", param="training", mend="Set one of them."
            )
        replay_N = np.zeros(len(group_N), dtype=bool) if is_replay_N is None else np.asarray(is_replay_N)
        self._new = np.flatnonzero(~replay_N)
        self._replay = np.flatnonzero(replay_N)
        if len(self._new) == 0:
            raise ConfigError("the training file has no rows.", param="training_file", mend="Add rows.")
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0
        """Batches handed out so far."""
        self._share = _exact(replay_share) if len(self._replay) else Fraction(0)
        self._members = [self._new[m] for m in _group_members(np.asarray(group_N)[self._new])]
        self._check_sizes()
        self.steps_per_epoch = steps_per_epoch(len(self._new), batch_size, float(self._share))
        self.replay_per_epoch = self._replay_before(self.steps_per_epoch)
        planned = math.inf if epochs is None else epochs * self.steps_per_epoch
        self.num_steps = int(min(planned, math.inf if max_steps is None else max_steps))
        self._epoch_cache: tuple[int, list[IntArray]] = (-1, [])
        self._replay_cache: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.num_steps

    def __next__(self) -> IntArray:
        if self.step >= self.num_steps:
            raise StopIteration
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def batch(self, step: int) -> IntArray:
        """The sample indices of one global batch, training rows first, groups adjacent."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self._epoch_cache[0] != epoch:
            self._epoch_cache = (epoch, self._cut_epoch(epoch))
        first = epoch * self.replay_per_epoch + self._replay_before(k)
        last = epoch * self.replay_per_epoch + self._replay_before(k + 1)
        return np.concatenate([self._epoch_cache[1][k], self._draw_replay(first, last)])

    def state(self) -> dict[str, Any]:
        """Where the cursor stands and what it stands in; JSON-serialisable."""
        return {"step": self.step, "data": self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken. Raises StorageError if it belongs to other data or batches."""
        if state["data"] != self._identity():
            raise StorageError(
                f"the checkpoint's order is that of {state['data']}, but this job has {self._identity()}.",
                mend="Resume with the same files, batch_size, seed and replay_share, or start a new job.",
            )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": len(self._new),
            "groups": len(self._members),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "replay_rows": len(self._replay),
            "replay_share": float(self._share),
        }

    def _check_sizes(self) -> None:
        room = self.batch_size - math.ceil(self.batch_size * self._share)
        largest = max(len(m) for m in self._members)
        if room < 1:
            raise ConfigError(
                f"replay_share {float(self._share)} leaves no new rows in a batch of {self.batch_size}.",
                param="training.batch_size",
                mend="Raise batch_size or lower replay_share.",
            )
        if largest > room:
            raise ConfigError(
                f"a group of {largest} rows is never split, but a batch has room for {room} new rows only.",
                param="training.batch_size",
                mend=f"Set batch_size to at least {math.ceil(largest / (1 - self._share))}.",
            )

    def _replay_before(self, k: int) -> int:
        """Replay rows in an epoch before its batch k; the last batch has its share of the rows left."""
        if k < self.steps_per_epoch:
            return _replay_until(k, self.batch_size, self._share)
        before = _replay_until(k - 1, self.batch_size, self._share)
        left = len(self._new) - ((k - 1) * self.batch_size - before)
        return before + _round(left * self._share / (1 - self._share))

    def _cut_epoch(self, epoch: int) -> list[IntArray]:
        order = _generator(self.seed, _TRAINING, epoch).permutation(len(self._members))
        members = [self._members[g] for g in order]
        boundary = np.cumsum([len(m) for m in members])
        k = range(1, self.steps_per_epoch)
        wanted = np.array([_new_until(i, self.batch_size, self._share) for i in k], dtype=np.int64)
        # a group fits into a batch, so a boundary at or before the first cut there always is
        cuts = boundary[np.searchsorted(boundary, wanted, side="right") - 1]
        return np.split(np.concatenate(members), cuts)

    def _draw_replay(self, first: int, last: int) -> IntArray:
        drawn = np.empty(last - first, dtype=np.int64)
        for j in range(first, last):
            epoch, position = divmod(j, len(self._replay))
            if self._replay_cache[0] != epoch:
                order = _generator(self.seed, _REPLAY, epoch).permutation(len(self._replay))
                self._replay_cache = (epoch, self._replay[order])
            drawn[j - first] = self._replay_cache[1][position]
        return drawn


def steps_per_epoch(num_rows: int, batch_size: int, replay_share: float = 0.0) -> int:
    """Batches in which every training row appears once, the last one maybe smaller.

    >>> steps_per_epoch(10, 4), steps_per_epoch(8, 4, replay_share=0.5)
    (3, 4)
    """
    share = _exact(replay_share)
    steps = max(1, math.floor(num_rows / (batch_size * (1 - share))) - 1)
    while _new_until(steps, batch_size, share) < num_rows:
        steps += 1
    return steps


def _exact(share: float) -> Fraction:
    """As a fraction, so that counts of replay rows are the same integers on any machine."""
    return Fraction(share).limit_denominator(1_000_000)


def _round(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def _replay_until(k: int, batch_size: int, share: Fraction) -> int:
    """Replay rows in the first k full batches."""
    return _round(k * batch_size * share)


def _new_until(k: int, batch_size: int, share: Fraction) -> int:
    """Training rows wanted in the first k full batches."""
    return k * batch_size - _replay_until(k, batch_size, share)


def _generator(seed: int, stream: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, stream, epoch]))


def _group_members(group_N: IntArray) -> list[IntArray]:
    """Indices of each group, groups in order of first appearance, rows in file order."""
    group_N = np.asarray(group_N, dtype=np.int64)
    alone_N = group_N < 0
    key_N = np.where(alone_N, np.arange(len(group_N)), group_N + len(group_N))
    _, first_N, inverse_N = np.unique(key_N, return_index=True, return_inverse=True)
    order_N = np.lexsort((np.arange(len(group_N)), first_N[inverse_N]))
    starts = np.flatnonzero(np.diff(first_N[inverse_N][order_N], prepend=-1))
    return np.split(order_N, starts[1:])
