"""What a rank adds up during a step: sums, never means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from actors.forward import Forward
from actors.loss import Share
from actors.messages import RankReport, add_loads
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.types import IntArray


@dataclass
class Seconds:
    """Wall-clock seconds by part of a step."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started


class Tally:
    """Adds up a rank's report over its micro-batches; dummies count for nothing."""

    def __init__(self) -> None:
        self._loss = self._nll_sum = self._kl_sum = self._entropy_sum = 0.0
        self._num_correct = self._num_tokens = self._num_positions = self._num_padded = 0
        self._has_kl = False
        self._ratio = DeltaSums()
        self._load_L: tuple[IntArray, ...] | None = None
        self._balance: float | None = None
        self.nonfinite: list[int] = []  # positions of samples whose log-probability is not finite

    def add(self, forward: Forward, share: Share) -> None:
        scores = forward.scores
        self._has_kl = scores.kl_M is not None
        if forward.is_dummy:
            return
        log_prob_B = forward.by_sample(scores.log_prob_M)
        self.nonfinite += forward.index_B[~np.isfinite(log_prob_B)].tolist()
        self._loss += float(share.loss.detach())
        self._ratio += share.ratio
        self._load_L = add_loads(self._load_L, forward.load_L)
        if forward.balance is not None:
            self._balance = (self._balance or 0.0) + share.balance
        self._nll_sum -= float(log_prob_B.sum())
        self._num_correct += int(scores.correct_M.sum())
        self._num_tokens += len(scores.log_prob_M)
        self._num_positions += forward.batch.num_positions
        self._num_padded += forward.batch.num_padded
        if scores.kl_M is not None:
            self._kl_sum += float(scores.kl_M.detach().double().sum())
        if scores.entropy_M is not None:
            self._entropy_sum += float(scores.entropy_M.double().sum())

    def report(self, grad_norm: float, grad_norm_clipped: float, seconds: Seconds) -> RankReport:
        return RankReport(
            loss=self._loss,
            nll_sum=self._nll_sum,
            num_correct=self._num_correct,
            num_tokens=self._num_tokens,
            num_positions=self._num_positions,
            num_padded=self._num_padded,
            grad_norm=grad_norm,
            grad_norm_clipped=grad_norm_clipped,
            kl_sum=self._kl_sum if self._has_kl else None,
            entropy_sum=self._entropy_sum,
            seconds=seconds.parts,
            ratio=self._ratio,
            load_L=self._load_L,
            balance=self._balance,
        )
