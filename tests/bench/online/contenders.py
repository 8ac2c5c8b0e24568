"""Who does the work: each prints one line of JSON, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.alone import ROOT, environment
from tests.bench.online.case import LEARNING_RATE, Case, grader, trl_reward, write_prompts
from tests.bench.online.rounds import Step, route_bytes, summarise

TIMEOUT_S = 900


def ours(
    case: Case, model: Path, *, staleness: int = 0, replay: bool = False, on_ray: bool = False
) -> dict[str, float]:
    """A job as a user would write it, run by what `modeseek run` calls."""
    import yaml

    from actors.commands.train import prepare, run
    from modeseek_ray.jobs.paths import Home

    online: dict[str, Any] = {
        "preset": "grpo",
        "grader": grader(case),
        "rollout": {
            "samples_per_prompt": case.samples,
            "prompts_per_round": case.prompts,
            "max_tokens": case.max_tokens,
            "max_staleness": staleness,
            "ties": "keep",
        },
        "training": {
            "max_steps": case.rounds + 1,
            "learning_rate": LEARNING_RATE,
            "checkpoint_every": case.rounds + 1,
            "evaluate_every": case.rounds + 1,
        },
    }
    if replay:
        online["routing_replay"] = "R3"
    # On Ray trainer and engine have a core each, as two processes; here they take turns with all.
    threads = max(1, case.threads // 2) if on_ray else case.threads
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        job = {
            "model": str(model),
            "training_file": str(write_prompts(case, Path(scratch) / "prompts.jsonl")),
            "method": {"type": "online", "online": online},
            "resources": {"generators": 1, "cpus_per_worker": threads, "kv_cache_gib": 0.5},
        }
        file = Path(scratch) / "job.yaml"
        file.write_text(yaml.safe_dump(job), encoding="utf-8")
        steps: list[Step] = []

        def on_event(event: Mapping[str, Any]) -> None:
            if event["type"] == "metrics" and "rollout.written" in event["data"]:
                steps.append(Step(time.perf_counter(), time.process_time(), event["data"]))

        spec = prepare(file, Home(Path(scratch) / "home"), Path(scratch) / "out")
        run(spec, on_event, local=not on_ray)
        figures = summarise(steps)
        if on_ray:  # most of the work is in other processes
            del figures["samples_per_cpu_second"]
        if replay:
            figures["route_bytes_per_token"] = route_bytes(Path(scratch) / "out" / "rollouts")
        return figures


def trl(case: Case, model: Path, *, per_device: int) -> dict[str, float]:
    """`GRPOTrainer` by its defaults, but for gradient checkpointing, which is off: that is faster.

    `per_device`: samples of a micro-batch, 8 by default; a round is generated in one batch all the same.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[Step] = []
    logged: list[Mapping[str, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(Step(time.perf_counter(), time.process_time(), {}))

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, float], **____: Any) -> None:
            if "completions/mean_length" in logs:
                logged.append(dict(logs))

    torch.set_num_threads(case.threads)
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        lines = write_prompts(case, Path(scratch) / "prompts.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=trl_reward(case),
            args=GRPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=case.samples_per_round // per_device,
                num_generations=case.samples,
                max_completion_length=case.max_tokens,
                max_steps=case.rounds + 1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                shuffle_dataset=False,
            ),
            train_dataset=Dataset.from_list([_trl_row(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Watch()],
        )
        trainer.train()
    wall, cpu = ends[-1].wall - ends[0].wall, ends[-1].cpu - ends[0].cpu
    mean_tokens = float(np.mean([logs["completions/mean_length"] for logs in logged[1:]]))
    num_samples = case.rounds * case.samples_per_round
    return {
        "samples_per_second": num_samples / wall,
        "samples_per_cpu_second": num_samples / cpu,
        "tokens_per_second": num_samples * mean_tokens / wall,
        "mean_tokens": mean_tokens,
        "cut_share": float(np.mean([logs["completions/clipped_ratio"] for logs in logged[1:]])),
        "wall_seconds_per_round": wall / case.rounds,
    }


def _trl_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row.get("messages") or row["prompt"], "reference": row.get("reference", "")}


CONTENDERS: dict[str, Callable[[Case, Path], dict[str, float]]] = {
    "trl": lambda case, model: trl(case, model, per_device=8),
    "trl_whole_batch": lambda case, model: trl(case, model, per_device=case.samples_per_round),
    "ours": ours,
    "ours_overlapped": lambda case, model: ours(case, model, staleness=1),
    "ours_replayed": lambda case, model: ours(case, model, replay=True),
    "ours_two_processes": lambda case, model: ours(case, model, on_ray=True),
    "ours_two_processes_overlapped": lambda case, model: ours(case, model, staleness=1, on_ray=True),
}
MOE_ONLY = {"ours_replayed"}


def names_for(case: Case) -> list[str]:
    """Contenders that make sense for a model."""
    return [name for name in CONTENDERS if case.model == "playground" or name not in MOE_ONLY]


def run_one(name: str, case: Case, model: Path) -> dict[str, float]:
    """One contender in a process of its own. Raises `RuntimeError` with the end of its output if it fails."""
    variables = {
        **environment(case.threads),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "token",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "tests.bench.online", "--contender", name, str(model)]
    result = subprocess.run(
        [*command, "--case", json.dumps(asdict(case))],
        capture_output=True, text=True, timeout=TIMEOUT_S, env=variables, cwd=ROOT,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{name} failed:\n{(result.stdout + result.stderr)[-3000:]}")
    figures: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return figures
