"""A preference job, from OpenAI's rows to an exported model that prefers what it was shown."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actors.attempt import Attempt
from actors.attempt_spec import AttemptSpec
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement
from modeseek_ray.config import parse_config
from modeseek_ray.reports.results import read_metrics


def test_dpo_learns_the_preference(tiny_dense: Path, tmp_path: Path) -> None:
    training_file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"say {c}"}]},
            "preferred_output": [{"role": "assistant", "content": c * (1 + j % 3)}],
            "non_preferred_output": [{"role": "assistant", "content": c.upper() * (1 + j % 2)}],
        }
        for j, c in enumerate("abcdefgh")
    ]
    training_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    knobs = {"beta": 0.5, "batch_size": 4, "n_epochs": 6}
    training = {"learning_rate": 0.003, "evaluate_every": 12, "checkpoint_every": 12}
    config = parse_config(
        {
            "model": str(tiny_dense),
            "training_file": str(training_file),
            "method": {"type": "dpo", "dpo": {"hyperparameters": knobs, "training": training}},
        }
    )
    spec = AttemptSpec(
        "dpo", 1, config, {"training_file": training_file}, tiny_dense, tmp_path, tmp_path / "cache"
    )
    journal = ResultJournal(tmp_path / "results", CallbackSink(lambda event: None))
    result = asyncio.run(Attempt(spec, LocalPlacement(), journal).run())

    metrics = read_metrics(tmp_path / "results")
    loss_S = metrics.known("loss")[1]
    assert len(loss_S) == 12  # 8 pairs, 4 a step, 6 epochs
    assert loss_S[0] == pytest.approx(math.log(2), rel=1e-4)  # the policy is the start: every margin is 0
    assert loss_S[-1] < 0.3
    assert metrics.last("weights.preference_accuracy") == 1.0
    weights = pq.read_table(tmp_path / "results" / "weights.parquet").to_pydict()
    first = [w for step, w in zip(weights["step"], weights["weight"], strict=True) if step == 1]
    assert sorted(first) == pytest.approx([-0.5] * 4 + [0.5] * 4, abs=1e-3)  # +-2 beta sigma(0)
    assert result.model_path is not None and (result.model_path / "model.safetensors").is_file()
