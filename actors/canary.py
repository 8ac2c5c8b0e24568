"""Do trainer and engines give the same tokens the same log-probabilities, and how far apart may they be?

In float32 they agree to about 1e-6, so that 1e-4 catches whatever is wrong. In bfloat16 both round at every
operation, by how much depends on the model, and a wrong update may move log-probabilities by no more than
another model's rounding. So the tolerance is measured: on the same weights on both sides, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.errors import NumericsError

CANARY_SEQUENCES = 8
CANARY_TOKENS = 32  # of each, at most
# After a sync fewer do, because scoring many costs several times what moving the weights does: every weight
# of a dense model is asked by any token. They are other ones each time.
SYNC_TOKENS = 16
SYNC_LENGTH = 16  # of one sequence: few long ones are cheaper than many short ones


@dataclass(frozen=True)
class Tolerance:
    """How far the log-probabilities of one token may be apart on the two engines, nats."""

    largest: float
    mean: float
    median: float

    @classmethod
    def calibrated(cls, figures: Mapping[str, float]) -> Tolerance:
        """A few times what was seen of the same weights on both sides (`compare`'s figures).

        The median says most: a wrong update moves most tokens, and no single router that rounds to another
        expert, by which one token moves by .5 nats, moves it at all.

        >>> seen = {"largest": 0.2, "mean": 0.01, "median": 0.008}
        >>> Tolerance.calibrated({f"sync_{name}_difference_nats": value for name, value in seen.items()})
        Tolerance(largest=1.0, mean=0.05, median=0.024)
        """
        largest, mean, median = (
            figures[f"sync_{name}_difference_nats"] for name in ("largest", "mean", "median")
        )
        return cls(
            largest=max(FLOOR.largest, 5 * largest),
            mean=max(FLOOR.mean, 5 * mean),
            median=max(FLOOR.median, 3 * median),
        )

    def figures(self) -> dict[str, float]:
        return {f"sync_allowed_{name}_nats": value for name, value in vars(self).items()}


FLOAT32 = Tolerance(largest=1e-4, mean=1e-4, median=1e-4)
# bfloat16 before anything was measured: two different models are further apart.
UNMEASURED = Tolerance(largest=2.0, mean=5e-2, median=5e-2)
# And the least that is ever allowed there: the rounding of a model whose every token happened to agree.
FLOOR = Tolerance(largest=0.5, mean=2e-3, median=1e-3)
# Tokens more than in float32, so that the median of a sync's is near that of the measured ones.
BFLOAT16_TOKENS = 4


def cut_canary(
    sequences: Sequence[NDArray[np.int32]],
    max_length: int,
    *,
    count: int = CANARY_SEQUENCES,
    num_tokens: int = CANARY_TOKENS,
) -> list[NDArray[np.int32]]:
    """The first few sequences of at least two tokens, cut: an engine wants room for one token more."""
    length = min(num_tokens, max_length - 1)
    cut = [np.asarray(s[:length], dtype=np.int32) for s in sequences if len(s) >= 2]
    if not cut:
        raise ValueError("the canary needs a sequence of two tokens or more")
    return cut[:count]


def in_turn(bank: Sequence[NDArray[np.int32]], turn: int, num_tokens: int) -> list[NDArray[np.int32]]:
    """So many sequences of the bank that they have `num_tokens` (or all of it), each turn the next ones.

    >>> bank = [np.full(3, i, dtype=np.int32) for i in range(4)]
    >>> [int(s[0]) for s in in_turn(bank, 0, 5)], [int(s[0]) for s in in_turn(bank, 3, 5)]
    ([0, 1], [2, 3])
    """
    count = min(len(bank), -(-num_tokens // max(len(s) for s in bank)))
    return [bank[(turn * count + i) % len(bank)] for i in range(count)]


def tokens_to_reach(num_experts: int) -> int:
    """Tokens of a canary that asks every expert four times if its router chooses two a token, evenly.

    >>> tokens_to_reach(0), tokens_to_reach(8), tokens_to_reach(64), tokens_to_reach(512)
    (16, 16, 128, 256)
    """
    return min(max(SYNC_TOKENS, 2 * num_experts), CANARY_SEQUENCES * CANARY_TOKENS)


def compare(
    expected: Sequence[NDArray[np.float64]],
    answers: Sequence[Sequence[NDArray[np.float64]]],
    tolerance: Tolerance,
    version: int,
) -> dict[str, float]:
    """`expected[s][t]` of the trainer with `answers[e][s][t]` of each engine. Raises `NumericsError`."""
    largest = mean = median = 0.0
    ours = np.concatenate(expected)
    place = [(s, t) for s, log_prob_T in enumerate(expected) for t in range(1, len(log_prob_T) + 1)]
    for engine, answer in enumerate(answers):
        theirs = np.concatenate(answer)
        if len(theirs) != len(ours):
            raise RuntimeError(f"engine {engine} scored {len(theirs)} canary tokens of {len(ours)}")
        off = np.where(np.isfinite(ours) & np.isfinite(theirs), np.abs(theirs - ours), np.inf)
        worst = int(off.argmax())
        seen = Tolerance(float(off[worst]), float(off.mean()), float(np.median(off)))
        if not all(value <= getattr(tolerance, name) for name, value in vars(seen).items()):
            sequence, token = place[worst]
            raise NumericsError(
                f"weights of version {version} are not the same on both sides: token {token} of canary"
                f" {sequence} has a log-probability of {ours[worst]:.6f} in the trainer and"
                f" {theirs[worst]:.6f} in engine {engine}, {seen.largest:.2e} nats apart; {seen.mean:.2e} on"
                f" average and {seen.median:.2e} in the median (allowed: {tolerance.largest:.1e},"
                f" {tolerance.mean:.1e} and {tolerance.median:.1e}).",
                mend="The update did not give the engine the trainer's model: report this, with the"
                " model's architecture. The last checkpoint is intact.",
            )
        largest, mean, median = max(largest, seen.largest), max(mean, seen.mean), max(median, seen.median)
    return {
        "sync_largest_difference_nats": largest,
        "sync_mean_difference_nats": mean,
        "sync_median_difference_nats": median,
    }
