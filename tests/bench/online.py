"""Samples per second of a whole online loop, beside TRL's `GRPOTrainer` with transformers' generation.

    python -m tests.bench.online [--model 40m playground] [--json results.json]

The same prompts, reward, learning rate and threads, N samples a prompt, the policy gradient of group
advantages, one step a round; only rounds after the first count. `ours` runs `modeseek run --local`
(one process, strictly on-policy), `ours_overlapped` the same with `max_staleness: 1`, `ours_replayed`
(MoE models) with the sampler's expert routes recorded and replayed. On the model of 40 M parameters,
which is random and made on the spot, completions end by chance: two of its 261 tokens end a text, so
that lengths are spread from 1 to 192 around a mean of about 100 for every contender alike.

Aim: at least 3 times TRL's samples/s on the 40 M-parameter model. On the playground's model, where
every forward pass is shorter than what vLLM does around it, the ratio is reported without an aim.
Also reported: the share of wall time in which the trainer waits, the parts of a weight sync in copies
of as many bytes, and the bytes of routes per token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.alone import ROOT, environment

TIMEOUT_S = 900
LEARNING_RATE = 1e-6
EXTRA_END = "~"  # the second token that ends a text of the random model
WORDS = "rivers mirror amber engines hold quiet answers under seven copper moons".split()


@dataclass(frozen=True)
class Case:
    """The work, the same for all contenders."""

    model: Literal["40m", "playground"] = "40m"
    prompts: int = 8
    samples: int = 8
    max_tokens: int = 192
    rounds: int = 3  # counted; one more goes before them
    threads: int = 2
    width: int = 512
    layers: int = 10

    @classmethod
    def of(cls, model: Literal["40m", "playground"]) -> Case:
        return cls() if model == "40m" else cls(model="playground", max_tokens=12, rounds=12)

    @property
    def samples_per_round(self) -> int:
        return self.prompts * self.samples


def build_model(case: Case, directory: Path) -> Path:
    """A random dense Qwen3 over bytes, without a trained end: `<|end|>` and one more byte end a text."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from tests.conftest import byte_tokenizer, save_tiny

    save_tiny(
        directory,
        Qwen3Config,
        Qwen3ForCausalLM,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=max(1, case.width // 128),
        head_dim=64,
        max_position_embeddings=512,
    )
    tokenizer = byte_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EXTRA_END)]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(directory)
    return directory


def write_prompts(case: Case, path: Path) -> Path:
    """Questions for every round: texts for the random model, chats of the new task for the playground's."""
    count = case.prompts * (case.rounds + 1)
    if case.model == "playground":
        from modeseek_ray.jobs.paths import Home
        from modeseek_ray.playground import data_files

        lines = data_files(Home.from_environment().root)["new-task.prompts"].read_text().splitlines()[:count]
    else:
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(WORDS, rng.integers(3, 8))) for _ in range(count)]
        lines = [json.dumps({"prompt": f"{i}: {text}"}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def grader(case: Case) -> dict[str, Any]:
    """What `trl_reward` computes, as the product names it."""
    if case.model == "playground":
        return {
            "type": "string_check",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.reference }}",
            "operation": "eq",
        }
    return {"type": "length_penalty", "free_tokens": 0, "max_tokens": case.max_tokens}


# --- contenders: each prints one line of JSON


@dataclass(frozen=True)
class Step:
    """The end of a round."""

    wall: float  # seconds
    cpu: float  # of all threads of this process; other processes hardly disturb it
    figures: Mapping[str, Any]


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


def summarise(steps: Sequence[Step]) -> dict[str, float]:
    """Of the rounds after the first: from the end of its step to the end of the last one."""
    counted = [step.figures for step in steps[1:]]
    wall = steps[-1].wall - steps[0].wall
    written = sum(data["rollout.written"] for data in counted)
    tokens = sum(data["rollout.tokens"] for data in counted)
    trained = sum(data["seconds_total"] for data in counted)
    fastest = min(counted, key=lambda data: data["sync.seconds"] - data["sync.drain_seconds"])
    syncs = {
        name: fastest[f"sync.{name}"]
        for name in ("seconds", "drain_seconds", "gather_seconds", "load_seconds", "verify_seconds", "bytes")
    }
    return {
        "samples_per_second": written / wall,
        "samples_per_cpu_second": written / (steps[-1].cpu - steps[0].cpu),
        "tokens_per_second": tokens / wall,
        "mean_tokens": tokens / written,
        "cut_share": float(np.mean([data["rollout.cut_share"] for data in counted])),
        "wait_share": 1 - trained / wall,
        "step_seconds": trained / len(counted),
        "wall_seconds_per_round": wall / len(counted),
        **{f"sync_{name}": value for name, value in syncs.items()},
        "copy_seconds": copy_seconds(int(syncs["bytes"])),
    }


def copy_seconds(num_bytes: int, repeats: int = 7) -> float:
    """Copying as many bytes from one touched buffer to another, one thread, the fastest."""
    source, target = np.ones(num_bytes, dtype=np.uint8), np.ones(num_bytes, dtype=np.uint8)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - started)
    return min(found)


def route_bytes(rollouts: Path) -> float:
    """Bytes of routes on the wire per token that has a row of them (all but a sample's last)."""
    import pyarrow.parquet as pq

    num_bytes = rows = 0
    for path in rollouts.glob("round-*.parquet"):
        for row in pq.read_table(path, columns=["routes", "routes_shape"]).to_pylist():
            num_bytes += len(row["routes"])
            rows += row["routes_shape"][0]
    return num_bytes / rows


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


def trl_reward(case: Case) -> Callable[..., list[float]]:
    """The same numbers as `grader`."""
    if case.model == "playground":

        def is_right(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
            texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
            return [float(text == right) for text, right in zip(texts, reference, strict=True)]

        return is_right

    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-min(len(ids) / case.max_tokens, 1.0) for ids in completion_ids]

    return short


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


def model_of(case: Case, scratch: Path) -> Path:
    """The model's directory, built where it is random. Raises `RuntimeError` without the playground."""
    if case.model == "40m":
        return build_model(case, scratch / "model")
    from modeseek_ray.jobs.paths import Home
    from modeseek_ray.playground import locate

    found = locate("moe", Home.from_environment().root)
    if found is None:
        raise RuntimeError("the playground's model is not built: make playground")
    return found


def speed_up(
    found: Mapping[str, Mapping[str, float]], name: str = "ours", unit: str = "samples_per_second"
) -> float:
    """Over the faster of TRL's two ways."""
    theirs = max(figures[unit] for who, figures in found.items() if who.startswith("trl"))
    return found[name][unit] / theirs


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    shown = Table(title="Online loop, end to end", title_justify="left")
    for heading in ("model", "contender"):
        shown.add_column(heading, no_wrap=True)
    columns = (
        "samples/s",
        "by CPU s",
        "tokens/s",
        "mean length",
        "cut",
        "waits",
        "sync / copy",
        "of which verify",
        "B/token",
    )
    for heading in columns:
        shown.add_column(heading, justify="right")
    for model, found in results.items():
        for name, figures in found.items():
            shown.add_row(model, name, *_cells(figures))
        shown.add_section()
    return shown


def _cells(figures: Mapping[str, float]) -> list[str]:
    copy = figures.get("copy_seconds")
    return [
        f"{figures['samples_per_second']:.2f}",
        f"{figures['samples_per_cpu_second']:.2f}" if "samples_per_cpu_second" in figures else "",
        f"{figures['tokens_per_second']:.0f}",
        f"{figures['mean_tokens']:.0f}",
        f"{figures['cut_share']:.0%}",
        f"{figures['wait_share']:.0%}" if "wait_share" in figures else "",
        f"{(figures['sync_seconds'] - figures['sync_drain_seconds']) / copy:.1f}" if copy else "",
        f"{figures['sync_verify_seconds'] / copy:.1f}" if copy else "",
        f"{figures['route_bytes_per_token']:.1f}" if "route_bytes_per_token" in figures else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["40m", "playground"], default=["40m", "playground"])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 3, and 12 on the playground)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, model = options.contender
        print("\n" + json.dumps(CONTENDERS[name](Case(**options.case), Path(model))))
        return
    console = Console() if sys.stdout.isatty() else Console(width=140)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in options.model:
        case = Case.of(kind)
        case = case if options.rounds is None else replace(case, rounds=options.rounds)
        with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
            model_path = model_of(case, Path(scratch))
            names = [name for name in names_for(case) if name in options.contenders]
            results[kind] = {}
            for name in names:
                with console.status(f"{kind}: {name}"):
                    results[kind][name] = run_one(name, case, model_path)
    console.print(table(results))
    for kind, found in results.items():
        if "ours" in found and any(name.startswith("trl") for name in found):
            aim = " (aim: at least 3)" if kind == "40m" else ""
            by_cpu = speed_up(found, unit="samples_per_cpu_second")
            console.print(
                f"{kind}: {speed_up(found):.2f} times TRL's samples/s{aim}, {by_cpu:.2f} by CPU time",
                highlight=False,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
