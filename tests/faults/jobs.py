"""The small jobs that cells break: data, and what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.cells import Kind

STEPS: dict[Kind, int] = {"offline": 12, "online": 6}
CHECKPOINT_EVERY: dict[Kind, int] = {"offline": 4, "online": 2}


def training_file(kind: Kind, directory: Path, prompts: Path | None) -> Path:
    """`prompts` themselves for online jobs; counting to 63, written to `directory`, for offline ones."""
    if kind == "online":
        assert prompts is not None
        return prompts
    path = directory / "train.jsonl"
    rows = [{"prompt": f"say {i} ", "completion": f"{i} " * 20} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def body(kind: Kind, model: Path, file_id: str) -> dict[str, Any]:
    """What is submitted: two ranks, a checkpoint every few steps, the same seed each time."""
    training: dict[str, Any] = {
        "max_steps": STEPS[kind],
        "checkpoint_every": CHECKPOINT_EVERY[kind],
        "learning_rate": 1e-3,
    }
    if kind == "offline":
        training |= {"epochs": 3, "batch_size": 16}
        method: dict[str, Any] = {"preset": "mode_seeking", "training": training}
        return {
            "model": str(model),
            "training_file": file_id,
            "method": {"type": "weighted", "weighted": method},
            "resources": {"trainers": 2, "zero_stage": 2},
        }
    return {
        "model": str(model),
        "training_file": file_id,
        "method": online(training),
        "resources": {"trainers": 2, "zero_stage": 2, "generators": 1},
    }


def online(training: dict[str, Any]) -> dict[str, Any]:
    """The method of a job on rows with a `prompt` and a `reference`: 16 short texts a round, none left out."""
    grader = {
        "type": "string_check",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.reference }}",
        "operation": "eq",
    }
    method = {
        "reward": {"scheme": "exponential", "beta": 0.5, "scope": "group"},
        "grader": grader,
        "rollout": {"samples_per_prompt": 4, "prompts_per_round": 4, "max_tokens": 8, "ties": "keep"},
        "training": training,
    }
    return {"type": "online", "online": method}
