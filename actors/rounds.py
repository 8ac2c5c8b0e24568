"""Iterated variational fitting: the policy frozen as each round begins, as a column of the data set.

A job's steps are cut into equal rounds (METHODS.md section 3, `iterative`). As one begins, every row
is scored under the policy of that moment; the scores are kept on disk, so that an attempt which
resumes in mid-round weighs by the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.roles import Trainer
from modeseek_ray.types import FloatArray, Group

SAMPLES_AT_ONCE = 64  # a scoring pass may keep its graphs: never all of a data set at once


class FrozenRounds:
    """Fills `log_round_N`. Rows are told apart by their number, replay rows by being replay."""

    def __init__(
        self, everything: Sequence[Group], directory: Path, *, rounds: int, total_steps: int
    ) -> None:
        """`everything` are all training rows, each once; `directory` is the job's own."""
        self._everything = [g for g in everything if g.is_replay_N is None or not g.is_replay_N.any()]
        self._directory = directory
        self._rounds = rounds
        self._total_steps = total_steps
        self._round = -1
        self._of_row: FloatArray = np.zeros(0)

    async def fill(self, groups: Sequence[Group], step: int, trainer: Trainer) -> list[Group]:
        """The groups with log pi_k of their rows, k the round that `step` lies in. Replay rows get NaN."""
        number = min(self._rounds - 1, step * self._rounds // self._total_steps)
        if number != self._round:
            self._of_row = await self._scores(number, trainer)
            self._round = number
        return [self._filled(group) for group in groups]

    def _filled(self, group: Group) -> Group:
        if group.is_replay_N is not None and group.is_replay_N.any():
            return group.with_columns(log_round_N=np.full(len(group), np.nan))
        return group.with_columns(log_round_N=self._of_row[group.row_N])

    async def _scores(self, number: int, trainer: Trainer) -> FloatArray:
        path = self._directory / f"round-{number}.npy"
        if path.is_file():
            stored: FloatArray = np.load(path, allow_pickle=False)
            return stored
        of_row = np.full(1 + max(int(g.row_N.max()) for g in self._everything), np.nan)
        for chunk in _chunks(self._everything):
            for group in await trainer.score(chunk):
                of_row[group.row_N] = group.log_policy_N
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, of_row)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return of_row


def _chunks(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in order, about `SAMPLES_AT_ONCE` samples at a time."""
    chunks: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if size and size + len(group) > SAMPLES_AT_ONCE:
            chunks.append([])
            size = 0
        chunks[-1].append(group)
        size += len(group)
    return chunks
