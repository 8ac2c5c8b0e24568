"""`python -m tests.faults [TEXT…]`: cells of the fault matrix, all of them by default, as a table."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.conftest import save_tiny
from tests.faults.cells import CELLS, Cell, Kind, pairwise
from tests.faults.laboratory import Finding, Laboratory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="cells whose name contains one of these")
    parser.add_argument("--kind", choices=["offline", "online"], help="cells of one kind of job")
    parser.add_argument("--pairwise", action="store_true", help="a selection that meets every pair of values")
    parser.add_argument("--no-forks", action="store_true", help="every process imports its own packages")
    asked = parser.parse_args()
    cells = [cell for cell in CELLS if asked.kind in (None, cell.kind)]
    cells = [cell for cell in cells if not asked.texts or any(text in str(cell) for text in asked.texts)]
    if asked.pairwise:
        cells = pairwise(cells)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        models, prompts = _models(cells, directory)
        with Laboratory(directory, models, prompts, forks=not asked.no_forks) as laboratory:
            print("| fault | kept | attempts | steps redone | recovered in s | whole job, s |")
            print("|---|---|---|---|---|---|", flush=True)
            findings = [show(laboratory.calm(kind)) for kind in models]
            findings += [show(laboratory.run(cell)) for cell in cells]
            final = laboratory.final_problems()
    broken = sum(bool(finding.problems) for finding in findings)
    print(
        f"\n{len(cells) - broken} of {len(cells)} cells keep every promise. At the end: {final or 'nothing lost'}."
    )
    return 1 if broken or final else 0


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


def show(finding: Finding) -> Finding:
    kept = "; ".join(finding.problems) or ("yes, replayed" if finding.replayed else "yes")
    name = finding.cell or f"{finding.kind}: none"
    recovered = "" if finding.recovered_s is None else f"{finding.recovered_s:.1f}"
    print(
        f"| {name} | {kept} | {finding.attempts} | {finding.redone_steps} | {recovered}"
        f" | {finding.seconds:.0f} |",
        flush=True,
    )
    return finding


if __name__ == "__main__":
    sys.exit(main())
