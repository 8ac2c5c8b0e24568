"""A whole job, `modeseek run --local`, supervised and weighted: on the device and in float32 on the CPU.

python -m tests.gpu.job DIRECTORY     writes a small random MoE model and its data there (a process of its own)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.gpu.trainer import ROOT, _paths
from tests.gpu.workload import Case

METHODS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "weighted": {
        "likelihood": {
            "scheme": "ratio_power",
            "of": "initial_over_policy",
            "gamma": {"ess": {"floor": 0.5}},
        }
    },
}
TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 0.003}


def figures(case: Case, scratch: Path) -> dict[str, dict[str, Any]]:
    """Exit status, seconds and losses by method and dtype; how far losses are from the CPU's."""
    subprocess.run([sys.executable, "-m", "tests.gpu.job", str(scratch)], check=True, cwd=ROOT)
    methods = ["weighted"] if case.tiny else list(METHODS)
    asked = [(method, device, dtype) for method in methods for device, dtype in _places(case.device)]
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2)) as pool:
        answers = dict(zip(asked, pool.map(lambda a: run(*a, scratch), asked), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for (method, device, dtype), answer in answers.items():
        expected = answers[method, "cpu", "float32"]
        losses, others = np.array(answer["losses"]), np.array(expected["losses"])
        figures = {name: value for name, value in answer.items() if name != "losses"}
        if answer is not expected and len(losses) and losses.shape == others.shape:
            figures["losses_off_relative"] = float(np.abs(losses / others - 1).max())
            figures["last_loss"] = float(losses[-1])
        found[f"{method}, {device}, {dtype}"] = figures
    return found


def _places(device: str) -> list[tuple[str, str]]:
    """Float32 on the CPU is what the others are compared with."""
    return [
        ("cpu", "float32"),
        *((device, d) for d in ("float32", "bfloat16") if (device, d) != ("cpu", "float32")),
    ]


def run(method: str, device: str, dtype: str, scratch: Path) -> dict[str, Any]:
    name = f"{method}-{device}-{dtype}"
    job = {
        "model": str(scratch / "job-model"),
        "training_file": str(scratch / "rows.jsonl"),
        "method": {"type": method, method: {**METHODS[method], "training": TRAINING}},
        "resources": {"dtype": dtype, "gpus_per_worker": 1.0 if device == "cuda" else 0.0},
    }
    file, out = scratch / f"{name}.yaml", scratch / name
    file.write_text(yaml.safe_dump(job))
    environment = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    options = ["--local", "--out", str(out), "--home", str(scratch / "home")]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "actors.main", "run", str(file), *options],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": _paths()},
        capture_output=True,
        text=True,
        timeout=200,
    )
    answer: dict[str, Any] = {
        "status": done.returncode,
        "seconds": time.perf_counter() - started,
        "losses": [],
    }
    if done.returncode:
        return {**answer, "error": done.stdout[-500:] + done.stderr[-1500:]}
    from modeseek_ray.reports.results import read_metrics

    return {**answer, "losses": read_metrics(out / "results").known("loss")[1].tolist()}


def write(directory: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.conftest import save_tiny

    save_tiny(
        directory / "job-model",
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        hidden_size=64,
    )
    rows = [
        {"prompt": f"say {letter}{count} ", "completion": letter * count}
        for letter in "abcdefgh"
        for count in range(1, 5)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
