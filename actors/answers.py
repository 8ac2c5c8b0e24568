"""Questions to graded answers: sample, decode, grade."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.roles import Generator
from actors.rollouts import Rollout
from modeseek_ray.rewards import GradeItem, Grader, refuse_if_failing
from modeseek_ray.types import Prompt


class Decoder(Protocol):
    """Tokens to text, for graders."""

    def decode(self, token_ids_T: Sequence[int] | NDArray[Any], *, skip_special: bool = False) -> str: ...


class Answerer:
    """A generator and a grader, one after the other. Calls may overlap."""

    def __init__(
        self, generator: Generator, grader: Grader, decoder: Decoder, *, max_failed_share: float
    ) -> None:
        self._generator = generator
        self._grader = grader
        self._decoder = decoder
        self._max_failed_share = max_failed_share

    def text_of(self, token_ids_T: NDArray[np.int32]) -> str:
        """What a question looks like, special tokens included."""
        return self._decoder.decode(token_ids_T)

    async def answer(self, prompts: Sequence[Prompt], round_: int) -> tuple[list[Rollout], dict[str, float]]:
        """All samples of all prompts, and the seconds spent by part.

        Raises `GraderError` when a larger share than allowed could not be graded.
        """
        if not prompts:
            return [], {}
        began = time.monotonic()
        answers = await self._generator.sample(prompts, round_=round_)
        written = time.monotonic()
        asked = [
            (p, i, c) for p, samples in zip(prompts, answers, strict=True) for i, c in enumerate(samples)
        ]
        texts = [self._decoder.decode(c.token_ids_T, skip_special=True) for _, _, c in asked]
        grades = await self._grader.grade(
            [GradeItem(t, p.reference, c.num_tokens) for (p, _, c), t in zip(asked, texts, strict=True)]
        )
        refuse_if_failing(grades, self._max_failed_share)
        rollouts = [Rollout(p, i, c, t, g) for (p, i, c), t, g in zip(asked, texts, grades, strict=True)]
        return rollouts, {"sample": written - began, "grade": time.monotonic() - written}
