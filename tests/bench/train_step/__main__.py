"""Tokens/s and peak memory of training and scoring, beside TRL and transformers, in one run.

    python -m tests.bench.train_step [--vocabulary 32000 128000] [--json results.json]

Every contender runs in a process of its own, one after the other, with the same model, samples and
threads. Aims: at least 2.5 times TRL's tokens/s with at most .35 of its memory, a weighted step at
most 1.15 of our SFT step, a scorer at least .9 of a transformers forward that keeps no logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from rich.console import Console
from rich.table import Table

from tests.bench.alone import ROOT, environment
from tests.bench.train_step.contenders import CONTENDERS, Outcome
from tests.bench.train_step.workload import PROMPT_SHARE, Case, build_model

TIMEOUT_S = 1800

Results = list[tuple[Case, dict[str, Outcome]]]


def run(name: str, model: Path, case: Case) -> Outcome:
    """Run one contender. Raises `RuntimeError` with the end of its output if it fails."""
    command = [sys.executable, "-m", "tests.bench.train_step.contenders", name, str(model)]
    result = subprocess.run(
        [*command, json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(case.threads),
        cwd=ROOT,
    )
    if result.returncode:
        raise RuntimeError(f"{name} failed on {case}:\n{(result.stdout + result.stderr)[-3000:]}")
    return Outcome(**json.loads(result.stdout.strip().splitlines()[-1]))


def run_case(case: Case, contenders: Sequence[str], console: Console) -> dict[str, Outcome]:
    """These contenders on one case; the model is thrown away afterwards."""
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        model = build_model(case, Path(scratch) / "model")
        outcomes = {}
        for name in contenders:
            with console.status(f"{case.vocabulary:,} {case.layout}: {name}"):
                outcomes[name] = run(name, model, case)
    return outcomes


@dataclass(frozen=True)
class Aim:
    """`over` compared with `under`, and how large the ratio has to be (at least) or may be (at most)."""

    name: str
    over: str
    under: str
    quantity: Literal["tokens/s", "time", "memory"]
    bound: float

    def ratio(self, outcomes: Mapping[str, Outcome], *, cpu: bool = False) -> float:
        """By wall clock, or by the CPU time of all threads, which other processes hardly disturb."""
        over, under = (self._value(outcomes[name], cpu) for name in (self.over, self.under))
        return under / over if self.quantity == "tokens/s" else over / under

    def reached(self, ratio: float) -> bool:
        return ratio >= self.bound if self.quantity == "tokens/s" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.quantity == 'tokens/s' else '<='} {self.bound:.2f}"

    def _value(self, outcome: Outcome, cpu: bool) -> float:
        if self.quantity == "memory":
            return outcome.peak_bytes
        return median(outcome.cpu_seconds if cpu else outcome.seconds)


AIMS = [
    Aim("tokens/s, SFT over TRL", "our_sft", "trl_sft", "tokens/s", 2.5),
    Aim("peak memory, SFT over TRL", "our_sft", "trl_sft", "memory", 0.35),
    Aim("step time, weighted over SFT", "our_weighted", "our_sft", "time", 1.15),
    Aim("tokens/s, scorer over transformers", "our_scorer", "bare_scorer", "tokens/s", 0.9),
]


def share_of_cpu(case: Case, outcome: Outcome) -> float:
    """CPU time got of what the threads could have had: well below one = something else was running."""
    return sum(outcome.cpu_seconds) / (case.threads * sum(outcome.seconds))


def figures_table(results: Results) -> Table:
    table = Table(title="Figures", title_justify="left")
    for heading in ("vocabulary", "data", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "s per step", "CPU s", "of CPU", "peak GB", "first loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case, outcomes in results:
        for name, outcome in outcomes.items():
            seconds = median(outcome.seconds)
            table.add_row(
                f"{case.vocabulary:,}",
                case.layout,
                name,
                f"{case.tokens_per_step / seconds:,.0f}",  # all positions count, trained on or not
                f"{seconds:.2f}",
                f"{median(outcome.cpu_seconds):.2f}",
                f"{share_of_cpu(case, outcome):.0%}",
                f"{outcome.peak_bytes / 1e9:.2f}",
                f"{outcome.losses[0]:.4f}" if outcome.losses else "",
            )
        table.add_section()
    return table


def aims_table(results: Results) -> Table:
    """Aims whose two contenders ran. The mark is by wall clock."""
    table = Table(title="Aims", title_justify="left")
    for heading in ("vocabulary", "data", "ratio", "seen", "by CPU time", "aim", ""):
        table.add_column(heading, justify="left" if heading in ("data", "ratio") else "right", no_wrap=True)
    for case, outcomes in results:
        for aim in AIMS:
            if aim.over not in outcomes or aim.under not in outcomes:
                continue
            ratio = aim.ratio(outcomes)
            by_cpu = "" if aim.quantity == "memory" else f"{aim.ratio(outcomes, cpu=True):.2f}"
            mark = "[green]✓[/]" if aim.reached(ratio) else "[red]✗[/]"
            table.add_row(
                f"{case.vocabulary:,}", case.layout, aim.name, f"{ratio:.2f}", by_cpu, str(aim), mark
            )
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--layout", nargs="+", choices=list(PROMPT_SHARE), default=list(PROMPT_SHARE))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the raw outcomes here")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    results: Results = []
    for vocabulary in options.vocabulary:
        for layout in options.layout:
            case = Case(vocabulary=vocabulary, layout=layout, threads=options.threads)
            results.append((case, run_case(case, options.contenders, console)))
            console.print(figures_table(results[-1:]), aims_table(results[-1:]), sep="\n")
    if len(results) > 1:
        console.rule("All cases")
        console.print(figures_table(results), aims_table(results), sep="\n")
    if any(share_of_cpu(case, outcome) < 0.8 for case, outcomes in results for outcome in outcomes.values()):
        console.print(
            "Some contender got less than 80 % of the CPU time it could have used (column `of CPU`): either it"
            " is not parallel throughout, or other processes ran. Repeat on an idle machine before believing it."
        )
    if options.json is not None:
        raw = [{"case": asdict(c), "outcomes": {n: asdict(o) for n, o in os_.items()}} for c, os_ in results]
        options.json.write_text(json.dumps(raw, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
