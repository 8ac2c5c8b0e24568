"""Graders: (what the model wrote, the row it answers) -> a number. README.md lists them.

`GraderSection` is what a user writes, `build_grader` what grades it; a grader of your own is a function and an
entry point (`registry.py`).
"""

from modeseek_ray.rewards.build import build_grader, check_grader
from modeseek_ray.rewards.grader import (
    Grade,
    GradeItem,
    Grader,
    GraderError,
    NotInSampleError,
    SampleError,
    refuse_if_failing,
)
from modeseek_ray.rewards.parameters import GraderSection

__all__ = [
    "Grade",
    "GradeItem",
    "Grader",
    "GraderError",
    "GraderSection",
    "NotInSampleError",
    "SampleError",
    "build_grader",
    "check_grader",
    "refuse_if_failing",
]
