"""Graders: (what the model wrote, the row it answers) -> a number. README.md lists them.

`GraderSection` is what a user writes, `build_grader` what grades it; a grader of your own is a function and an
entry point (`registry.py`).
"""

# First: plug-ins are loaded below, while this package is still half imported, and they want these.
from modeseek_ray.rewards.grader import (
    Grade,
    GradeItem,
    Grader,
    GraderError,
    NotInSampleError,
    SampleError,
    refuse_if_failing,
)

# isort: split
from modeseek_ray.rewards.build import build_grader, check_grader, local_models
from modeseek_ray.rewards.endpoints import Endpoint, read_endpoints
from modeseek_ray.rewards.parameters import GraderSection
from modeseek_ray.rewards.score_model import Classifier

__all__ = [
    "Classifier",
    "Endpoint",
    "Grade",
    "GradeItem",
    "Grader",
    "GraderError",
    "GraderSection",
    "NotInSampleError",
    "SampleError",
    "build_grader",
    "check_grader",
    "local_models",
    "read_endpoints",
    "refuse_if_failing",
]
