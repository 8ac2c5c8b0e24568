"""The scripts for a card run at toy size here; without a card they say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.workload import Case

ROOT = Path(__file__).parents[2]


def python(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )


def test_without_a_card_it_says_so() -> None:
    done = python({"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def at_toy_size(forks: Mapping[str, str], out: Path, *parts: str) -> dict[str, Any]:
    """The engine's part is left out: tests/actors/test_generator.py starts such an engine and is enough."""
    out = out / "figures.json"
    done = python(forks, "--device", "cpu", "--tiny", "--no-engine", "--json", str(out), "--only", *parts)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


@pytest.mark.slow
def test_the_same_code_runs_at_toy_size(tmp_path: Path, forks: dict[str, str]) -> None:
    figures = at_toy_size(forks, tmp_path, "kernel", "precision", "step", "replay", "scorer")
    assert figures["log-probability kernel"]["max_abs_error_nats"] < 1e-4
    assert figures["bfloat16 against float64"]["head_max_nats"] < 1e-4
    replayed = figures["routing replay, families"]
    assert replayed["families"] == replayed["own_routes_change_no_bit"] == replayed["recomputed_alike"]
    assert figures["scorer"]["tokens_per_s"] > 0
    assert figures["machine"]["toy_size"] is True
    for part in ("live", "recorded", "replayed"):
        step = figures[f"training step, {part}"]
        assert step["tokens_per_s"] > 0 and step["share_of_matmul_rate"] > 0


@pytest.mark.slow
def test_the_trainer_s_parts_run_at_toy_size(tmp_path: Path, forks: dict[str, str]) -> None:
    figures = at_toy_size(forks, tmp_path, "agreement", "pace", "estimate")
    assert figures["trainer against the CPU, float32, ZeRO 2"]["losses_off_relative"] < 1e-5
    assert figures["trainer's pace, bfloat16, ZeRO 2"]["weighted_over_sft"] > 0
    assert figures["plan, ZeRO 2"]["planned_step_s"] > 0


def test_floating_point_operations_of_a_step_are_those_of_the_products() -> None:
    """Counted by torch over the model's own forward and backward, with every expert's share of tokens."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3MoeForCausalLM

    case = Case("cpu", layers=2, samples=2, length=32, trained=32, tiny=True)
    config = case.config()
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = Qwen3MoeForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(5, 500, (2, 32))).logits.sum().backward()
    # Eager attention computes both halves of the causal square: counted twice there, once here.
    s = case.shape
    half = 3 * case.layers * case.num_tokens * 2 * case.length * s["num_attention_heads"] * s["head_dim"]
    assert counter.get_total_flops() == pytest.approx(case.step_flops() + half, rel=0.01)
