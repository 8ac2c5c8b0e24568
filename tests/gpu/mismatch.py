"""A bfloat16 trainer against a bfloat16 vLLM engine of the same weights: with no replay, with R2, with R3.

python -m tests.gpu.mismatch SAMPLE-SPEC OUT     (a process of its own: the engine's memory goes with it)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeseek_ray.objectives.collate import collate
from modeseek_ray.objectives.model import ScoringModel
from modeseek_ray.routing.compare import mismatch
from modeseek_ray.routing.describe import find_routers, layer_map
from modeseek_ray.routing.hooks import record_routes, replay_routes
from modeseek_ray.routing.wire import Routes, batch_routes, split_batch
from modeseek_ray.types import Completion, Sample
from tests.gpu.workload import Case

ROOT = Path(__file__).parents[2]
MICRO_BATCH = 4


def sampled(case: Case, model: Path, out: Path) -> list[Sample]:
    """What a vLLM engine writes with these weights, with its log-probabilities and routes."""
    wanted = {
        "model": str(model),
        "device": case.device,
        "prompts": case.samples,
        "prompt_tokens": max(4, case.length // 8),
        "new_tokens": min(case.trained, 64 if case.tiny else 256),
        "vocabulary": case.shape["vocab_size"],
    }
    subprocess.run(
        [sys.executable, "-m", "tests.gpu.mismatch", json.dumps(wanted), str(out)], check=True, cwd=ROOT
    )
    with np.load(out) as stored:
        return [
            sample_of(i, stored[f"tokens-{i}"], stored[f"log_prob-{i}"], stored[f"routes-{i}"])
            for i in range(int(stored["count"]))
        ]


def sample_of(row: int, token_ids_T: np.ndarray, log_prob_T: np.ndarray, routes_TLK: np.ndarray) -> Sample:
    """Tokens of prompt and answer, of which the answer is trained, as an engine wrote and routed it."""
    trained_T = np.arange(len(token_ids_T)) >= len(token_ids_T) - len(log_prob_T)
    log_behavior_T = np.zeros(len(token_ids_T), dtype=np.float32)
    log_behavior_T[trained_T] = log_prob_T
    return Sample(row, token_ids_T, trained_T, log_behavior_T=log_behavior_T, routes_TLK=routes_TLK)


def table(module: ScoringModel, samples: list[Sample], device: str) -> dict[str, dict[str, float]]:
    """Trainer against engine. `none`: live routes. `R2`: those the trainer took in micro-batches of four, when
    it scores one by one (the layout alone changes bfloat16's bits). `R3`: the engine's."""
    from actors.begun import changed  # loads DeepSpeed, which the engine's process does not want
    from actors.messages import RouteCounts

    live, own = score(module, samples, device, MICRO_BATCH, None)
    module.eval()
    answers = {
        "none": (live, own),
        "R2": score(module, samples, device, 1, own),
        "R3": score(module, samples, device, MICRO_BATCH, [s.routes_TLK for s in samples]),
    }
    log_engine = np.concatenate([s.log_behavior_T[s.trained_T] for s in samples])  # type: ignore[index]
    figures = {}
    for name, (log_prob_M, routes) in answers.items():
        counts = sum(
            (
                changed(a, s.routes_TLK)
                for a, s in zip(routes, samples, strict=True)
                if s.routes_TLK is not None
            ),
            RouteCounts(),
        )
        found = mismatch(log_engine, log_prob_M, writer="engine", reader="trainer")
        figures[name] = {
            "kl_k3_nats": found.kl_nats,
            "share_over_two": found.share_far,
            "mean_abs_nats": found.mean_abs,
            "max_abs_nats": found.max_abs,
            **counts.figures(),
        }
    return figures


@torch.no_grad()
def score(
    module: ScoringModel, samples: list[Sample], device: str, size: int, given: list[Any] | None
) -> tuple[np.ndarray, list[Routes]]:
    """Log-probabilities of the sampled tokens, and the routes that were asked, in wire form."""
    module.eval()
    layers = layer_map(find_routers(module))
    columns, routes = [], []
    for first in range(0, len(samples), size):
        chosen = samples[first : first + size]
        batch = collate(chosen, range(len(chosen)), pad_id=1).to(device)
        inputs = (batch.input_ids_BS, batch.attention_mask_BS, batch.positions_M, batch.target_M)
        if given is None:
            with record_routes(module) as recording:
                scores = module(*inputs)
            asked = recording.routes
        else:
            asked = batch_routes(given[first : first + size], batch.input_ids_BS.shape[1], layers=layers)
            with replay_routes(module, asked):
                scores = module(*inputs)
        columns.append(scores.log_prob_M.double().cpu().numpy())
        routes += split_batch(asked, [s.length for s in chosen], layers.num_experts)
    return np.concatenate(columns), routes


def write(wanted: dict[str, Any], out: Path) -> None:
    """In a process of its own: the engine writes one completion a prompt."""
    from actors.generator import GeneratorEngine, GeneratorSpec, Sampling, requests_of
    from actors.vllm_engine import environment
    from modeseek_ray.types import Prompt

    on_gpu = wanted["device"] == "cuda"
    spec = GeneratorSpec(
        model_path=wanted["model"],
        sampling=Sampling(samples_per_prompt=1, max_tokens=wanted["new_tokens"]),
        dtype="bfloat16",
        max_length=wanted["prompt_tokens"] + wanted["new_tokens"] + 8,
        with_routes=True,
        kv_cache_gib=None if on_gpu else 0.1,
        gpus_per_worker=1.0 if on_gpu else 0.0,
    )
    os.environ.update(environment(spec))
    engine = GeneratorEngine(spec)
    engine.setup()
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(i, rng.integers(5, wanted["vocabulary"], wanted["prompt_tokens"]).astype(np.int32))
        for i in range(wanted["prompts"])
    ]
    written: list[Completion] = engine.sample([r for p in prompts for r in requests_of(spec, p, 0)])
    arrays: dict[str, Any] = {"count": len(written)}
    for i, (prompt, completion) in enumerate(zip(prompts, written, strict=True)):
        arrays[f"tokens-{i}"] = np.concatenate([prompt.token_ids_T, completion.token_ids_T])
        arrays[f"log_prob-{i}"] = completion.log_prob_T
        arrays[f"routes-{i}"] = completion.routes_TLK
    np.savez(out, **arrays)
    engine.close()


if __name__ == "__main__":
    write(json.loads(sys.argv[1]), Path(sys.argv[2]))
