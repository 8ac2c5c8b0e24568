"""`python -m tests.faults [TEXT…]`: cells of the fault matrix, all of them by default, as a table."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import save_tiny
from tests.faults.cells import CELLS, Cell, Kind, pairwise
from tests.faults.laboratory import Laboratory
from tests.faults.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="cells whose name contains one of these")
    parser.add_argument("--kind", choices=["offline", "online"], help="cells of one kind of job")
    parser.add_argument("--pairwise", action="store_true", help="a selection that meets every pair of values")
    parser.add_argument("--no-forks", action="store_true", help="every process imports its own packages")
    parser.add_argument("--out", type=Path, help="append rows to this Markdown file; cells in it are skipped")
    asked = parser.parse_args()
    cells = [cell for cell in CELLS if asked.kind in (None, cell.kind)]
    cells = [cell for cell in cells if not asked.texts or any(text in str(cell) for text in asked.texts)]
    if asked.pairwise:
        cells = pairwise(cells)
    table = Table(asked.out)
    left = [cell for cell in cells if str(cell) not in table.kept]
    final = _run(left, table, forks=not asked.no_forks) if left else []
    sound = sum(table.kept.get(str(cell), "not done").startswith("yes") for cell in cells)
    print(f"\n{sound} of {len(cells)} cells keep every promise. At the end: {final or 'nothing lost'}.")
    return 1 if sound < len(cells) or final else 0


def _run(cells: list[Cell], table: Table, *, forks: bool) -> list[str]:
    """Cell by cell on one service. Returns what is wrong with its store at the end."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        models, prompts = _models(cells, directory)
        with Laboratory(directory, models, prompts, forks=forks) as laboratory:
            for kind in models:
                calm = laboratory.calm(kind)
                table.add(calm)
                if calm.problems:  # nothing to compare with; they stay to be done
                    cells = [cell for cell in cells if cell.kind != kind]
            started = time.monotonic()
            for done, cell in enumerate(cells):
                eta = ""
                if done:
                    rest_s = (time.monotonic() - started) / done * (len(cells) - done)
                    eta = f", about {rest_s / 60:.0f} min to go"
                print(f"{done + 1} of {len(cells)}: {cell}{eta}", file=sys.stderr, flush=True)
                table.add(laboratory.run(cell))
            return laboratory.final_problems()


def _models(cells: list[Cell], directory: Path) -> tuple[dict[Kind, Path], Path | None]:
    """A tiny random model for offline jobs, the playground's for online ones."""
    models: dict[Kind, Path] = {}
    prompts = None
    if any(cell.kind == "offline" for cell in cells):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        models["offline"] = save_tiny(directory / "models" / "tiny", Qwen3Config, Qwen3ForCausalLM)
    if any(cell.kind == "online" for cell in cells):
        from modeseek_ray.playground import data_files, locate

        home = Path(os.environ.get("MODESEEK_HOME", Path.home() / ".modeseek"))
        model = locate("dense", home)
        if model is None:
            raise SystemExit("there is no playground model yet: make playground")
        models["online"] = model
        prompts = data_files(home)["new-task.prompts"]
    return models, prompts


if __name__ == "__main__":
    sys.exit(main())
