"""Rollout and weight sync beside what they stand on: bare vLLM, and a copy in memory.

    python -m tests.bench.rollout [--width 512] [--layers 8] [--json results.json]

Aims: tokens/s through the actor at least .95 of bare vLLM asked for the same (a seed and the
log-probability of each token); routes on at least .95 of routes off; a sync at most five times the
time of copying as many bytes. Every contender runs in a process of its own, with the same model,
prompts and threads; times are medians over repeats (a sync: the fastest), and CPU seconds of the engine's
process stand beside wall seconds, because other work on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from actors.generator import GeneratorSpec, Sampling, requests_of
from modeseek_ray.types import Prompt
from tests.bench import alone

TURN = "MODESEEK_BENCH_TURN"  # a lock's file: contenders that run beside each other measure in turns


@dataclass(frozen=True)
class Case:
    """The work, the same for all contenders."""

    moe: bool
    width: int = 512
    layers: int = 8
    vocabulary: int = 8192
    num_prompts: int = 16
    samples: int = 4
    new_tokens: int = 64
    repeats: int = 5
    threads: int = 1

    def spec(self, model: str, **changes: Any) -> GeneratorSpec:
        return GeneratorSpec(
            model_path=model,
            sampling=Sampling(samples_per_prompt=self.samples, max_tokens=self.new_tokens),
            max_length=256,
            kv_cache_gib=1.0,
            cpus_per_worker=self.threads,
            **changes,
        )

    def prompts(self) -> list[Prompt]:
        rng = np.random.default_rng(0)
        lengths = rng.integers(16, 64, self.num_prompts)
        return [
            Prompt(i, rng.integers(5, self.vocabulary, n).astype(np.int32)) for i, n in enumerate(lengths)
        ]


def build_model(case: Case, directory: Path) -> None:
    """A random model; its end token is never likely, so completions have their full length."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.conftest import save_tiny

    settings: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "intermediate_size": 2 * case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.width // 64,
        "num_key_value_heads": case.width // 128,
        "head_dim": 64,
    }
    torch.manual_seed(0)
    if case.moe:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": case.width}
        save_tiny(directory, Qwen3MoeConfig, Qwen3MoeForCausalLM, **settings, **experts)
    else:
        save_tiny(directory, Qwen3Config, Qwen3ForCausalLM, **settings)


# --- contenders: each prints one line of JSON


def bare_llm(case: Case, model: str, **options: Any) -> Any:
    """vLLM in this process, as the actor sets it up. It reads its environment when it is imported: not before this."""
    from actors.vllm_engine import environment

    spec = case.spec(model)
    os.environ.update(environment(spec))
    from vllm import LLM

    return LLM(
        model=model,
        dtype=spec.dtype,
        max_model_len=spec.max_length,
        max_num_seqs=spec.max_num_seqs,
        kv_cache_memory_bytes=2**30,
        distributed_executor_backend="uni",
        enforce_eager=True,
        **options,
    )


def bare(case: Case, model: str, *, same: bool) -> dict[str, float]:
    """`LLM.generate` in this process. `same`: with seeds and log-probabilities, as the actor has to."""
    llm = bare_llm(case, model, logprobs_mode="processed_logprobs" if same else "raw_logprobs")
    from vllm import SamplingParams

    spec = case.spec(model)
    requests = [r for prompt in case.prompts() for r in requests_of(spec, prompt, 0)]
    asked = [{"prompt_token_ids": r.prompt.tolist()} for r in requests]
    parameters = [
        SamplingParams(
            max_tokens=case.new_tokens,
            detokenize=False,
            **({"seed": r.seed, "logprobs": 0, "flat_logprobs": True} if same else {}),
        )
        for r in requests
    ]

    async def write() -> int:
        outputs = llm.generate(asked, parameters, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return asyncio.run(timed(case, write, os.getpid()))


async def through_the_actor(case: Case, model: str, *, routes: bool) -> dict[str, float]:
    """The pool of one engine, placed by Ray as a job places it."""
    from actors.cluster import RayPlacement, connect
    from modeseek_ray.config import Resources

    connect(num_cpus=4)
    placement = RayPlacement(Resources())
    spec = case.spec(model, with_routes=routes)
    await placement.reserve(trainers=0, generators=1, generator=spec)
    pool = await placement.generators(spec, 1)
    facts = await pool.setup()
    prompts = case.prompts()

    async def write() -> int:
        answer = await pool.sample(prompts, round_=0)
        return sum(c.num_tokens for completions in answer for c in completions)

    try:
        return await timed(case, write, facts["pid"])
    finally:
        await pool.close()
        await placement.close()


async def sync(case: Case, model: str) -> dict[str, float]:
    """Trainer to engine over Ray's object store, without its proof, too, and a copy of as many bytes here."""
    from actors.cluster import RayPlacement, connect
    from actors.trainer import TrainerSpec
    from actors.transfers import MemoryTransfer
    from actors.weight_sync import VerifiedChannel
    from modeseek_ray.config import Resources, Training
    from modeseek_ray.types import Objective

    connect(num_cpus=4)
    resources = Resources(zero_stage=2, cpus_per_worker=case.threads)
    placement = RayPlacement(resources)
    spec = case.spec(model)
    await placement.reserve(trainers=1, generators=1, generator=spec)
    trainer = await placement.trainers(TrainerSpec(model, Objective(), Training(), resources, seed=0), 1)
    pool = await placement.generators(spec, 1)
    try:
        await asyncio.gather(trainer.setup(), pool.setup())
        channel = VerifiedChannel(trainer, pool, [p.token_ids_T for p in case.prompts()])
        figures = [await channel.sync(version) for version in range(1, case.repeats + 2)][1:]
        transfer, unproven = MemoryTransfer(trainer, pool), []
        for version in range(case.repeats + 2, 2 * case.repeats + 2):
            started = time.perf_counter()
            await pool.hold()
            await transfer.load(await transfer.gather(version), version)
            await pool.release(version)
            unproven.append(time.perf_counter() - started)
    finally:
        await pool.close()
        await trainer.close()
        await placement.close()
    source = np.ones(int(figures[0]["sync_bytes"]), dtype=np.uint8)
    target = np.ones_like(source)
    copies = []
    for _ in range(case.repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - started)
    # The fastest of both: what runs beside them can only make them slower.
    best = min(figures, key=lambda found: found["sync_seconds"])
    return {**best, "unproven_seconds": min(unproven), "copy_seconds": min(copies)}


def reload(case: Case, model: str) -> dict[str, float]:
    """vLLM's own loader alone, in one process, from tensors that lie there: no checksum, no proof, no trainer."""
    from safetensors.torch import load_file

    llm = bare_llm(case, model)
    weights = {name: tensor.clone() for name, tensor in load_file(Path(model) / "model.safetensors").items()}
    seconds = []
    for _ in range(case.repeats):
        started = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        seconds.append(time.perf_counter() - started)
    return {"reload_seconds": min(seconds)}


async def timed(case: Case, write: Callable[[], Awaitable[int]], pid: int) -> dict[str, float]:
    """Medians of tokens per wall second and per CPU second of process `pid`; the first run is warm-up.

    It also fills the prefix cache, with the same prompts for all contenders.
    """
    process = psutil.Process(pid)

    def cpu_seconds() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    turn = FileLock(os.environ[TURN]) if TURN in os.environ else nullcontext()
    wall, cpu = [], []
    for _ in range(case.repeats + 1):
        with turn:
            started, started_cpu = time.perf_counter(), cpu_seconds()
            num_tokens = await write()
            wall.append(num_tokens / (time.perf_counter() - started))
            cpu.append(num_tokens / (cpu_seconds() - started_cpu))
        await asyncio.sleep(0.2)  # for another to take its turn
    return {"tokens_per_second": median(wall[1:]), "tokens_per_cpu_second": median(cpu[1:])}


CONTENDERS: dict[str, Callable[[Case, str], dict[str, float]]] = {
    "bare": lambda case, model: bare(case, model, same=False),
    "bare_same": lambda case, model: bare(case, model, same=True),
    "actor": lambda case, model: asyncio.run(through_the_actor(case, model, routes=False)),
    "actor_routes": lambda case, model: asyncio.run(through_the_actor(case, model, routes=True)),
    "sync": lambda case, model: asyncio.run(sync(case, model)),
    "reload": reload,
}


def run(name: str, case: Case, model: Path, variables: Mapping[str, str] | None = None) -> dict[str, float]:
    """One contender in a process of its own, told these `variables`, too. Raises `RuntimeError` with the end of its
    output if it fails."""
    command = [sys.executable, "-m", "tests.bench.rollout", "--contender", name, str(model)]
    result = subprocess.run(
        [*command, "--case", json.dumps(asdict(case))],
        capture_output=True, text=True, timeout=900, cwd=alone.ROOT,
        env={**alone.environment(case.threads), **(variables or {})},
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{name} failed:\n{(result.stdout + result.stderr)[-3000:]}")
    figures: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return figures


def run_in_turns(names: Sequence[str], case: Case, model: Path) -> dict[str, dict[str, float]]:
    """All contenders at once, of which only one is ever at work: they hand a lock on after each repeat.

    One after the other they would meet a machine whose pace drifts by a tenth and more within minutes.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(names)) as threads:
        turn = {TURN: str(Path(scratch) / "turn")}
        return dict(zip(names, threads.map(lambda name: run(name, case, model, turn), names), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        name, model = arguments.contender
        print(json.dumps(CONTENDERS[name](Case(**arguments.case), model)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    table = Table("model", "contender", "figures")
    for moe in (False, True):
        case = Case(moe=moe, width=arguments.width, layers=arguments.layers)
        kind = "moe" if moe else "dense"
        with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
            build_model(case, Path(scratch) / "model")
            names = [n for n in CONTENDERS if moe or n != "actor_routes"]
            results[kind] = {name: run(name, case, Path(scratch) / "model") for name in names}
        for name, figures in results[kind].items():
            table.add_row(kind, name, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    console = Console()
    console.print(table)
    for kind, found in results.items():
        for unit in ("tokens_per_second", "tokens_per_cpu_second"):
            ratio = found["actor"][unit] / found["bare_same"][unit]
            console.print(f"{kind}: actor over bare vLLM, {unit}: {ratio:.3f} (aim 0.95)")
            if "actor_routes" in found:
                ratio = found["actor_routes"][unit] / found["actor"][unit]
                console.print(f"{kind}: routes on over off, {unit}: {ratio:.3f} (aim 0.95)")
        sync_figures = found["sync"]
        copy = sync_figures["copy_seconds"]
        console.print(f"{kind}: sync over copy: {sync_figures['sync_seconds'] / copy:.1f} (aim at most 5)")
        for part in ("gather", "load", "verify"):
            console.print(f"{kind}:   of which {part}: {sync_figures[f'sync_{part}_seconds'] / copy:.1f}")
        console.print(f"{kind}:   vLLM's own loader alone: {found['reload']['reload_seconds'] / copy:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
