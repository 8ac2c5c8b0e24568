"""Which prompts to draw next: more of what is not mastered, less of what is (METHODS.md section 5).

P  prompts of the job      B  prompts of one batch
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from modeseek_ray.types import FloatArray, IntArray

# What a small mean weight says of a prompt: it is not mastered, or it is the one that was learnt most.
Steering = Literal["low_is_unmastered", "low_is_mastered"]
LARGEST_TILT = 10.0  # a prompt is drawn at most so many times as often as a neutral one, or as rarely


@dataclass(frozen=True)
class PromptLedger:
    """Uses and summed relative weights of every prompt. Never changed: `add` gives the next one.

    >>> ledger = PromptLedger.empty(3).add(np.array([0, 0, 2]), np.array([1.5, 0.5, 4.0]))
    >>> ledger.mean_P
    array([1., 1., 4.])
    """

    uses_P: IntArray
    sum_P: FloatArray

    @classmethod
    def empty(cls, num_prompts: int) -> PromptLedger:
        return cls(np.zeros(num_prompts, np.int64), np.zeros(num_prompts))

    def add(self, prompt_N: IntArray, weights_N: FloatArray) -> PromptLedger:
        """With the samples of one step: which prompt each answers, and its weight (mean one)."""
        size = len(self.uses_P)
        return replace(
            self,
            uses_P=self.uses_P + np.bincount(prompt_N, minlength=size),
            sum_P=self.sum_P + np.bincount(prompt_N, weights=np.abs(weights_N), minlength=size),
        )

    @property
    def mean_P(self) -> FloatArray:
        """Mean weight of a prompt's samples; 1, the neutral one, where it was not drawn yet."""
        return np.divide(self.sum_P, self.uses_P, out=np.ones(len(self.sum_P)), where=self.uses_P > 0)

    def state(self) -> dict[str, Any]:
        """JSON-serialisable, for a checkpoint."""
        return {"uses": self.uses_P.tolist(), "sum": self.sum_P.tolist()}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> PromptLedger:
        return cls(np.array(state["uses"], np.int64), np.array(state["sum"], np.float64))


def prompt_probabilities(ledger: PromptLedger, strength: float, steering: Steering) -> FloatArray:
    """Chance of each prompt, [P], summing to one: (1 - strength) uniform + strength tilted by 1/m or m.

    m is the prompt's mean weight, held within a factor of `LARGEST_TILT` of 1. So below strength 1 every
    prompt keeps a share, whatever its weight. Raises `ValueError` for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], not {strength}")
    mean_P = np.clip(ledger.mean_P, 1 / LARGEST_TILT, LARGEST_TILT)
    tilted_P = 1 / mean_P if steering == "low_is_unmastered" else mean_P
    chance_P = (1 - strength) / len(mean_P) + strength * tilted_P / tilted_P.sum()
    return chance_P / chance_P.sum()


def draw_prompts(
    ledger: PromptLedger,
    n: int,
    rng: np.random.Generator,
    strength: float,
    *,
    steering: Steering = "low_is_unmastered",
) -> IntArray:
    """Indices of n prompts, [B]: different ones, until every prompt is in the batch and a second pass begins.

    `strength` 0 draws uniformly, 1 wholly by mean weight. Which way depends on the ratio:
    `initial_over_policy` is large where the model has not learnt yet, so there it is `low_is_mastered`.

    >>> ledger = PromptLedger.empty(2).add(np.array([0, 1]), np.array([0.1, 10.0]))
    >>> chosen = [int(draw_prompts(ledger, 1, np.random.default_rng(i), 1.0)[0]) for i in range(20)]
    >>> chosen.count(0)
    20
    """
    chance_P = prompt_probabilities(ledger, strength, steering)
    size = len(chance_P)
    passes, rest = divmod(n, size)
    whole = [rng.permutation(size) for _ in range(passes)]
    return np.concatenate([*whole, rng.choice(size, size=rest, replace=False, p=chance_P)]).astype(np.int64)
