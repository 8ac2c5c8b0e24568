"""Several graders over the same samples, and one formula over their grades."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from modeseek_ray.rewards.expression import Formula
from modeseek_ray.rewards.grader import Grade, GradeItem, Grader, failed, grade_of


class MultiGrader:
    """Asks all parts at once. `Grade.parts` keeps what each of them said, also where another failed."""

    def __init__(self, parts: Mapping[str, Grader], formula: Formula) -> None:
        self._parts = parts
        self._formula = formula

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        columns = await asyncio.gather(*(part.grade(items) for part in self._parts.values()))
        return [self._combine(dict(zip(self._parts, row, strict=True))) for row in zip(*columns, strict=True)]

    def _combine(self, grades: Mapping[str, Grade]) -> Grade:
        values = {name: grade.reward for name, grade in grades.items() if grade.reward is not None}
        errors = [f"{name}: {grade.error}" for name, grade in grades.items() if grade.error is not None]
        if errors:
            return Grade(None, error="; ".join(errors), parts=values)
        try:
            return Grade(grade_of(self._formula(values)).reward, parts=values)
        except Exception as error:
            return Grade(None, error=failed(error).error, parts=values)

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in self._parts.values()))
