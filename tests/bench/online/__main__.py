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
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tests.bench.online.case import Case, model_of
from tests.bench.online.contenders import CONTENDERS, names_for, run_one
from tests.bench.online.table import speed_up, table


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
