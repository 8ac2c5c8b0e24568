"""Does weighting forget less? The study of PROTOCOL.md, in pieces, resumable.

    python -m tests.bench.forgetting run                     # all that is missing, in the protocol's order
    python -m tests.bench.forgetting run --piece standard --minutes 30
    python -m tests.bench.forgetting show                    # how much of each piece is there
    python -m tests.bench.forgetting report --out DIR        # tables, figures, one HTML page
    python -m tests.bench.forgetting small                   # the reduced set, under 10 minutes on two cores

Every run is stored the moment it ends, under MODESEEK_HOME/bench-forgetting/runs.jsonl; stop with Ctrl-C at any
time, start again to go on. Processes may share the work: `--share 1/2` here and `--share 2/2` there. One run
is 120 steps of 32 rows on a model of 0.4 M parameters: 4 to 9 seconds of one core.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PIECES = ("standard", "long", "rewards", "far", "noisy", "lengths")
# The reduced set: what the headline is about, on one report base.
SMALL_METHODS = ("sft", "mode_seeking", "anchored", "flow", "dft")
SMALL_VALIDATION, SMALL_REPORT = (1, 0), (5, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = {"run": run, "show": show, "report": report, "small": small}[options.command]
    return command(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    home = Path(os.environ.get("MODESEEK_HOME") or Path.home() / ".modeseek")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--home", type=Path, default=home, help=f"base models and runs ({home})")
        return command

    def add_choice(command: argparse.ArgumentParser) -> None:
        command.add_argument("--arch", choices=("dense", "moe"), default="dense", help="base models (dense)")
        command.add_argument(
            "--trials", type=int, default=10, help="of each method's grid, from the middle (10, at least 1)"
        )

    running = add("run", "Run what is missing, in the protocol's order.")
    add_choice(running)
    running.add_argument("--piece", choices=PIECES, action="append", help="only these; may be repeated (all)")
    running.add_argument("--methods", nargs="+", help="only these (all); a selection needs all of them")
    running.add_argument(
        "--units", nargs="+", metavar="BASE.DATA", help="only these units, 1.1 for example (all)"
    )
    running.add_argument("--share", default="1/1", metavar="K/N", help="the K-th of N equal shares (1/1)")
    running.add_argument("--device", default="cpu", help="where models train: cpu or cuda (cpu)")
    running.add_argument("--minutes", type=float, help="begin no run after this long")
    add_choice(add("show", "How much of each piece is there."))
    reporting = add("report", "Tables, figures and one page of both architectures, of what is stored.")
    reporting.add_argument("--out", type=Path, default=Path("forgetting-report"), help="where to write")
    reporting.add_argument("--results", type=Path, help="a results.parquet instead of the stored runs")
    reduced = add("small", "Five methods, five learning rates, one report base: the headline's direction.")
    add_choice(reduced)
    reduced.add_argument("--out", type=Path, default=Path("build/forgetting-small"), help="where to write")
    reduced.add_argument("--minutes", type=float, default=9.0, help="begin no run after this long (9)")
    reduced.set_defaults(share="1/1", device="cpu")
    return parser


def run(options: argparse.Namespace) -> int:
    units = [tuple(int(x) for x in unit.split(".")) for unit in options.units or []]
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for piece in options.piece or PIECES:
        if not _do(options, piece, units, deadline, options.methods):
            print(f"stopped in {piece}: time is up; the same command goes on", file=sys.stderr)
            return 3
    return 0


def _do(
    options: argparse.Namespace,
    piece: str,
    units: Sequence[tuple[int, ...]],
    deadline: float | None,
    methods: Sequence[str] | None,
    selected_on: Sequence[tuple[int, int]] | None = None,
) -> bool:
    """Everything of one piece that is not stored; False if time ran out. Trials are `selected_on` all validation
    units unless some are named."""
    from tests.bench.forgetting import study

    store = store_of(options.home)
    source = study.source_of(piece)
    chosen_on = [unit for unit in study.VALIDATION if not units or unit in units]
    if piece not in study.FOLLOWING and chosen_on:
        jobs = list(study.validation_jobs(options.arch, piece, options.trials, chosen_on))
        if not work(_chosen(options, jobs, methods), store, options, deadline, f"{piece}: validation"):
            return False
        missing = _of_methods(jobs, methods) - set(store.rows())
        if missing:  # a selection among fewer trials would be another one
            left = f"{piece}: {len(missing)} validation runs of other shares are missing"
            print(f"{left}; start this again once they are done", file=sys.stderr)
            return True
    report_units = [unit for unit in study.report_units(options.arch) if not units or unit in units]
    if not report_units:
        return True
    by = study.VALIDATION if selected_on is None else selected_on
    selected = study.select(options.arch, source, store.rows(), options.trials, methods, by)
    if not selected:
        print(f"{piece}: nothing was selected yet; run the validation of {source} first", file=sys.stderr)
        return True
    jobs = list(study.report_jobs(options.arch, piece, selected, report_units))
    return work(_chosen(options, jobs, methods), store, options, deadline, f"{piece}: report")


def _chosen(options: argparse.Namespace, jobs: Sequence[Any], methods: Sequence[str] | None) -> list[Any]:
    """This process's share of the jobs with these methods."""
    mine, shares = (int(x) for x in options.share.split("/"))
    return [job for job in jobs if methods is None or job.method in methods][mine - 1 :: shares]


def _of_methods(jobs: Sequence[Any], methods: Sequence[str] | None) -> set[str]:
    """Keys of the jobs with these methods, all shares."""
    return {job.key for job in jobs if methods is None or job.method in methods}


def work(
    jobs: Sequence[Any], store: Any, options: argparse.Namespace, deadline: float | None, title: str
) -> bool:
    """Run the jobs that are not stored, with a bar; False if time ran out."""
    import torch

    from tests.bench.forgetting.study import Unit

    torch.set_num_threads(1)
    units: dict[Any, Unit] = {}
    stored = store.rows()
    for job in _with_bar([j for j in jobs if j.key not in stored], title):
        if deadline is not None and time.monotonic() > deadline:
            return False
        if job.key in store.rows():  # another process was faster
            continue
        if job.unit not in units:
            units[job.unit] = Unit(*job.unit, options.home, options.device)
        result = units[job.unit].run(job.setting, whole_path=not job.is_validation)
        store.add({**_identity(job), **result, **environment(options.device)})
    return True


def _identity(job: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {"key": job.key, **asdict(job), "setting": asdict(job.setting), "is_validation": job.is_validation}


def _with_bar(jobs: Sequence[Any], title: str) -> Iterator[Any]:
    """A bar on a terminal, elsewhere a line for every twentieth run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(jobs))
        for done, job in enumerate(jobs):
            label = f"{title} {job.method} #{job.trial} on {job.base_seed}.{job.data_seed}"
            bar.update(task, description=label)
            if not console.is_terminal and done % 20 == 0:
                print(f"{time.strftime('%H:%M:%S')} {done}/{len(jobs)} {label}", file=sys.stderr, flush=True)
            yield job
            bar.advance(task)


def store_of(home: Path) -> Any:
    from tests.bench.forgetting.study import Store

    return Store(home / "bench-forgetting" / "runs.jsonl")


def show(options: argparse.Namespace) -> int:
    from tests.bench.forgetting import study

    rows = store_of(options.home).rows()
    for piece in PIECES:
        source = study.source_of(piece)
        done = planned = 0
        if piece not in study.FOLLOWING:
            keys = [job.key for job in study.validation_jobs(options.arch, piece, options.trials)]
            done, planned = sum(key in rows for key in keys), len(keys)
            print(f"{piece:9} validation {done}/{planned}")
        selected = study.select(options.arch, source, rows, options.trials)
        for unit in study.report_units(options.arch):
            keys = [job.key for job in study.report_jobs(options.arch, piece, selected, [unit])]
            print(f"{piece:9} report {unit[0]}.{unit[1]} {sum(key in rows for key in keys)}/{len(keys)}")
    return 0


def report(options: argparse.Namespace) -> int:
    from tests.bench.forgetting.page import write

    for path in write(options.home, options.out, options.results):
        print(path)
    return 0


def small(options: argparse.Namespace) -> int:
    """Validation and report of five methods; then the same table, marked as reduced."""
    from tests.bench.forgetting.tables import small_table

    options.trials = min(options.trials, 5)
    deadline = time.monotonic() + 60 * options.minutes
    units = [SMALL_VALIDATION, SMALL_REPORT]
    finished = _do(options, "standard", units, deadline, SMALL_METHODS, [SMALL_VALIDATION])
    print(small_table(options.home, options.arch, options.trials, SMALL_METHODS, *units))
    if not finished:
        print("time was up before all runs were done; the same command goes on", file=sys.stderr)
    return 0 if finished else 3


_ENVIRONMENT: dict[str, Any] = {}


def environment(device: str) -> dict[str, Any]:
    """Commit, versions, the kind of processor and its cores: nothing that names a machine."""
    if not _ENVIRONMENT:
        _ENVIRONMENT.update(
            commit=_git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
            cpu=_cpu(),
            cores=os.cpu_count(),
            device="cpu" if device == "cpu" else _card(),
            versions={
                "python": platform.python_version(),
                **{n: version(n) for n in ("torch", "transformers", "numpy", "peft")},
            },
        )
    return dict(_ENVIRONMENT)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _card() -> str:
    import torch

    return torch.cuda.get_device_name()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
