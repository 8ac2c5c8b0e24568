"""What every grader is: samples in, one grade each out, and never an exception for a bad sample.

N  samples handed to one call
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modeseek_ray.errors import ModeseekError

MAX_REWARD = 1e6  # as for rewards that stand in a data file
_LONGEST_ERROR = 500  # characters; errors may quote what a judge answered
_EXAMPLES = 3


class GraderError(ModeseekError):
    """Too many samples have no grade: the job stops rather than train on the rest alone."""

    code = "grader_failing"


class SampleError(Exception):
    """Why one sample has no grade: the grader, its endpoint or the row's reference is at fault."""


class NotInSampleError(SampleError):
    """What the grader looks at is not in the answer: that is a bad answer, which gets the lowest grade."""


@dataclass(frozen=True)
class GradeItem:
    """One sample: the text the model wrote, and the fields of the row that graders compare with.

    >>> GradeItem(text="4", item={"reference": "4"}, num_tokens=2).item["reference"]
    '4'
    """

    text: str
    item: Mapping[str, Any]
    num_tokens: int


@dataclass(frozen=True)
class Grade:
    """A finite reward, or the reason why there is none; `parts` are the grades a `multi` was made of.

    >>> Grade(0.5).error is None, Grade(None, "the judge did not answer").reward is None
    (True, True)
    """

    reward: float | None
    error: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.error is None):
            raise ValueError("a grade has a reward or an error, and not both")
        if self.reward is not None and not abs(self.reward) <= MAX_REWARD:  # NaN compares false
            raise ValueError(
                f"a reward must be between -{MAX_REWARD:g} and {MAX_REWARD:g}, not {self.reward}"
            )


class Grader(Protocol):
    """Grades samples. One object serves a whole job; calls may overlap."""

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """One grade per sample, in order, [N]. A sample that cannot be graded gets `Grade(None, error)`."""
        ...

    async def close(self) -> None:
        """Give back connections and processes. They also end with this process."""
        ...


class PerSample:
    """A grader from a plain function of one sample, run in a thread, so that the loop stays free.

    `grade_one` raises `SampleError` where it has no answer. Whatever else it raises is written down as
    that sample's error: a plug-in's mistake must not end the job by itself.
    """

    def __init__(self, grade_one: Callable[[GradeItem], float], *, lowest: float | None = None) -> None:
        """`lowest` is what a sample gets that lacks what the grader looks at; None = that is an error."""
        self._grade_one = grade_one
        self._lowest = lowest

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return await asyncio.to_thread(lambda: [self._one(item) for item in items])

    def _one(self, item: GradeItem) -> Grade:
        try:
            return grade_of(self._grade_one(item))
        except Exception as error:
            return failed(error, lowest=self._lowest)

    async def close(self) -> None:
        pass


def grade_of(reward: Any) -> Grade:
    """The grade of a number; `SampleError` where it is none, not finite, or larger than any reward may be."""
    try:
        value = float(reward)
    except (TypeError, ValueError):
        raise SampleError(f"a grade must be a number, not {reward!r}") from None
    if not math.isfinite(value) or abs(value) > MAX_REWARD:
        raise SampleError(f"a grade must be between -{MAX_REWARD:g} and {MAX_REWARD:g}, not {value:g}")
    return Grade(value)


def failed(error: Exception, *, lowest: float | None = None) -> Grade:
    """The grade of a sample whose grading raised `error`."""
    if isinstance(error, NotInSampleError) and lowest is not None:
        return Grade(lowest)
    name = "" if isinstance(error, SampleError) else f"{type(error).__name__}: "
    text = f"{name}{error}"
    return Grade(None, error=text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]} …")


def refuse_if_failing(grades: Sequence[Grade], limit: float) -> None:
    """Raise `GraderError` with up to three examples if more than the share `limit` has no grade.

    >>> refuse_if_failing([Grade(1.0), Grade(None, "no answer")], limit=0.5)
    """
    errors = [(n, grade.error) for n, grade in enumerate(grades) if grade.error is not None]
    if len(errors) <= limit * len(grades):
        return
    different = {error: n for n, error in reversed(errors)}  # the first sample of each error
    examples = sorted((n, error) for error, n in different.items())[:_EXAMPLES]
    raise GraderError(
        f"{len(errors)} of {len(grades)} samples could not be graded, more than the share of {limit:g} allowed: "
        + "; ".join(f"sample {n}: {error}" for n, error in examples)
        + ".",
        mend="Mend the grader or the rows it reads; or raise `max_failed_share`.",
    )
