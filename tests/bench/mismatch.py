"""One set of samples by an engine of one dtype, seen by a trainer of another under live routes, R2 and R3: the
table of `modeseek_ray/objectives/README.md`.

    python -m tests.bench.mismatch                                          # bfloat16 engine, float32 trainer
    python -m tests.bench.mismatch --engine float32 --trainer bfloat16

The playground's MoE model answers questions of its own new task. All rows are of the same tokens and the same
weights, so that they differ by routes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
COLUMNS = {
    "kl_k3_nats": "KL(engine, trainer), k3, nats/token",
    "mean_abs_nats": "mean abs(Δ log p)",
    "max_abs_nats": "largest",
    "routes/changed_tokens": "tokens with a changed expert",
    "share_over_two": "ratio over 2",
}


def measure(
    model: Path, prompts: Path, count: int, *, engine: str, trainer: str, samples_per_prompt: int = 4
) -> dict[str, Any]:
    """Rows of the table by name, and how many tokens they are of. The engine has a process of its own."""
    from actors.modeling import load_causal_lm
    from modeseek_ray.objectives.model import ScoringModel
    from tests.gpu import mismatch

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "samples.npz"
        wanted = {
            "model": str(model),
            "prompts": str(prompts),
            "count": count,
            "samples": samples_per_prompt,
            "dtype": engine,
        }
        command = [sys.executable, "-m", "tests.bench.mismatch", "--write", json.dumps(wanted), str(out)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        with np.load(out) as stored:
            samples = [
                mismatch.sample_of(i, stored[f"tokens-{i}"], stored[f"log_prob-{i}"], stored[f"routes-{i}"])
                for i in range(int(stored["count"]))
            ]
    module = ScoringModel(load_causal_lm(model, trainer))
    rows = mismatch.table(module, samples, "cpu")
    return {"rows": rows, "tokens": sum(s.num_tokens for s in samples), "samples": len(samples)}


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The rows as the README has them."""
    names = {
        "none": "live routes",
        "R2": "R2: the trainer's own, replayed",
        "R3": "R3: the engine's, replayed",
    }
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, figures in rows.items():
        cells = [
            f"{figures[c]:.2%}".replace("%", " %")
            if "over_two" in c or "changed" in c
            else f"{figures[c]:.2e}"
            for c in COLUMNS
        ]
        lines.append(f"| {names[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(wanted: Mapping[str, Any], out: Path) -> None:
    """In a process of its own: what the engine writes, with its log-probabilities and routes."""
    from actors.generator import GeneratorEngine, GeneratorSpec, Sampling, requests_of
    from actors.vllm_engine import environment
    from modeseek_ray.data.prompts import load_prompts
    from modeseek_ray.data.tokenizer import ChatTokenizer

    spec = GeneratorSpec(
        model_path=wanted["model"],
        sampling=Sampling(samples_per_prompt=wanted["samples"], max_tokens=16),
        dtype=wanted["dtype"],
        max_length=96,
        with_routes=True,
        kv_cache_gib=0.1,
    )
    os.environ.update(environment(spec))
    prompts = load_prompts(Path(wanted["prompts"]), ChatTokenizer(wanted["model"]), max_tokens=80)
    engine = GeneratorEngine(spec)
    engine.setup()
    requests = [(p, r) for p in prompts[: wanted["count"]] for r in requests_of(spec, p, 0)]
    written = engine.sample([request for _, request in requests])
    arrays: dict[str, Any] = {"count": len(written)}
    for i, ((prompt, _), completion) in enumerate(zip(requests, written, strict=True)):
        arrays[f"tokens-{i}"] = np.concatenate([prompt.token_ids_T, completion.token_ids_T])
        arrays[f"log_prob-{i}"] = completion.log_prob_T
        arrays[f"routes-{i}"] = completion.routes_TLK
    np.savez(out, **arrays)
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an MoE model's directory; the playground's by default")
    parser.add_argument("--data", type=Path, help="questions; the playground's by default")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--engine", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--trainer", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write:
        write(json.loads(asked.write[0]), Path(asked.write[1]))
        return
    from modeseek_ray.playground import data_files, locate

    home = Path(os.environ.get("MODESEEK_HOME", Path.home() / ".modeseek"))
    model = asked.model or locate("moe", home)
    if model is None:
        sys.exit("the playground's MoE model is not built: make playground")
    data = asked.data or data_files(home)["new-task.prompts"]
    found = measure(model, data, asked.prompts, engine=asked.engine, trainer=asked.trainer)
    print(
        f"{asked.engine} engine, {asked.trainer} trainer; {found['samples']} samples, {found['tokens']} tokens"
    )
    print(f"\n{markdown(found['rows'])}")


if __name__ == "__main__":
    main()
