"""What was forgotten: change and forgetting of each old task, and retention against new-task success."""

from __future__ import annotations

from modeseek_ray.retention.course import RetentionCourse
from modeseek_ray.retention.forgetting import TaskChange, forgetting, forgetting_path, retention_table
from modeseek_ray.retention.pareto import pareto_front, retention_at_success

__all__ = [
    "RetentionCourse",
    "TaskChange",
    "forgetting",
    "forgetting_path",
    "pareto_front",
    "retention_at_success",
    "retention_table",
]
