"""Online and best-of-N jobs, whole, with real vLLM: `modeseek run --local` in processes of their own.

They are forks of one that has imported their packages; the first, which is not killed, imports for itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from modeseek_ray.playground import data_files
from modeseek_ray.reports.results import read_metrics
from tests.conftest import head_of

ROUNDS = 6
GRADER = {
    "type": "string_check",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.reference }}",
    "operation": "eq",
}
ROLLOUT = {"samples_per_prompt": 4, "prompts_per_round": 8, "max_tokens": 8}


def job(model: Path, home: Path, directory: Path, method: dict[str, Any], **more: Any) -> Path:
    path = directory / "job.yaml"
    config = {
        "model": str(model),
        "training_file": str(data_files(home)["new-task.prompts"]),
        "method": method,
        **more,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(job_file: Path, out: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "actors.main", "run", str(job_file), "--local", "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
    )


def finish(job_file: Path, out: Path, environment: Mapping[str, str]) -> str:
    process = start(job_file, out, environment)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.fixture(scope="module")
def online(playground_moe: Path, modeseek_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything at once: routes replayed, inner steps clipped, a ratio to the start, KL."""
    method = {
        "type": "online",
        "online": {
            "reward": {"scheme": "exponential", "beta": 0.2, "scope": "group"},
            "likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": 0.3},
            "kl": {"direction": "forward", "coefficient": 0.05},
            "grader": GRADER,
            "rollout": {**ROLLOUT, "ties": "keep"},
            "mismatch": {"scheme": "tis"},
            "routing_replay": "R3",
            "compare_routes": True,
            "training": {
                "max_steps": ROUNDS,
                "inner_steps": 2,
                "learning_rate": 5e-4,
                "checkpoint_every": 3,
                "evaluate_every": 3,
            },
        },
    }
    directory = tmp_path_factory.mktemp("online")
    validation = head_of(data_files(modeseek_home)["new-task.prompts-valid"], 24, directory)
    return job(playground_moe, modeseek_home, directory, method, validation_file=str(validation))


@pytest.fixture(scope="module")
def whole(online: Path) -> Path:
    """The job run to its end without a fault."""
    out = online.parent / "whole"
    finish(online, out, {})
    return out


@pytest.mark.slow
def test_both_engines_agree_after_every_hand_over(whole: Path) -> None:
    metrics = read_metrics(whole / "results")
    steps_S, largest_S = metrics.known("sync.largest_difference_nats")
    # A step's figures are those of the hand-over before it.
    assert steps_S.tolist() == list(range(2, ROUNDS + 1)) and largest_S.max() < 1e-4
    # And what the trainer says of every token of a round is what the engine drew it with: exp(1e-4) - 1 = 1e-4.
    furthest_S = metrics.known("mismatch/max_abs_delta")[1]
    assert len(furthest_S) == ROUNDS and furthest_S.max() < 1e-4
    assert metrics.known("rollout.staleness")[1].tolist() == [0.0] * ROUNDS
    for name in ("loss", "grad_norm", "kl_nats", "rollout.reward", "ratio/mean_abs_delta"):
        values_S = metrics.known(name)[1]
        assert len(values_S) == ROUNDS and np.isfinite(values_S).all(), name


@pytest.mark.slow
def test_routes_of_the_engine_are_those_of_the_trainer_in_float32(whole: Path) -> None:
    changed_S = read_metrics(whole / "results").known("routes/changed_token_layers")[1]
    assert len(changed_S) == ROUNDS and changed_S.max() < 1e-3


@pytest.mark.slow
def test_killed_in_mid_job_it_ends_with_the_same_bits(
    whole: Path, online: Path, forks: dict[str, str]
) -> None:
    """kill -9 between two checkpoints; what was written before is read again, not written anew."""
    out = online.parent / "killed"
    process = start(online, out, forks)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = sorted(p.name for p in (out / "rollouts").glob("round-*.parquet"))
    assert len(before) >= 5
    text = finish(online, out, forks)
    assert "Resumed from step-3" in text
    hashes = [json.loads((d / "results" / "job.json").read_text())["weights_sha256"] for d in (whole, out)]
    assert hashes[0] == hashes[1] and hashes[0] is not None
    assert read_metrics(out / "results").known("rollout.reused")[1].sum() >= 2


@pytest.mark.slow
def test_rollouts_can_be_trained_on_again_without_a_generator(
    whole: Path, online: Path, forks: dict[str, str]
) -> None:
    """Another weighting of the same samples, by their recorded rewards and log-probabilities."""
    config = yaml.safe_load(online.read_text())
    weighting = {
        "reward": {"scheme": "exponential", "beta": 0.5, "scope": "group"},
        "likelihood": {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.3},
        "training": {"max_steps": 4, "batch_size": 32, "learning_rate": 1e-4},
    }
    config |= {
        "training_file": str(whole / "results" / "rollouts.parquet"),
        "method": {"type": "weighted", "weighted": weighting},
    }
    again = online.parent / "again.yaml"
    again.write_text(yaml.safe_dump(config), encoding="utf-8")
    out = online.parent / "again"
    finish(again, out, forks)
    gammas_S = read_metrics(out / "results").known("gamma")[1]
    assert len(gammas_S) == 4 and (gammas_S > 0).any()


@pytest.mark.slow
def test_best_of_n_keeps_every_candidate_and_trains_on_them_if_asked(
    playground_dense: Path, modeseek_home: Path, tmp_path: Path, forks: dict[str, str]
) -> None:
    prompts = head_of(data_files(modeseek_home)["new-task.prompts"], 12, tmp_path)
    grader = {**GRADER, "operation": "ne"}
    then = {"preset": "bon", "training": {"max_steps": 3, "batch_size": 16, "learning_rate": 1e-4}}
    method = {"type": "best_of_n", "best_of_n": {"grader": grader, "rollout": ROLLOUT, "then": then}}
    file = job(playground_dense, modeseek_home, tmp_path, method, training_file=str(prompts))
    out = tmp_path / "out"
    finish(file, out, forks)
    rows = [json.loads(line) for line in (out / "results" / "best_of_n.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 13))
    for row in rows:
        rewards = [candidate["reward"] for candidate in row["candidates"]]
        assert len(rewards) == 4 and row["reward"] == max(rewards)
        assert row["choice"] == rewards.index(max(rewards))
        assert row["best"] == row["candidates"][row["choice"]]["text"]
    assert pq.read_metadata(out / "results" / "rollouts.parquet").num_rows == 48
    assert (out / "model" / "model.safetensors").is_file()
