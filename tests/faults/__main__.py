"""`python -m tests.faults [TEXT…]`: every cell of the matrix (whose name contains a TEXT), as a table."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.conftest import save_tiny
from tests.faults.matrix import CELLS, Finding, Laboratory


def main() -> int:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    wanted = sys.argv[1:]
    cells = [cell for cell in CELLS if not wanted or any(text in str(cell) for text in wanted)]
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        (Path(directory) / "home").mkdir()
        model = save_tiny(Path(directory) / "models" / "tiny", Qwen3Config, Qwen3ForCausalLM)
        with Laboratory(Path(directory), model) as laboratory:
            print("| fault | kept | attempts | steps redone | seconds |\n|---|---|---|---|---|", flush=True)
            calm = laboratory.run(None)
            show(calm)
            findings = []
            for cell in cells:
                findings.append(laboratory.run(cell, calm.weights_sha256))
                show(findings[-1])
    broken = sum(bool(finding.problems) for finding in [calm, *findings])
    print(f"\n{len(cells) - broken} of {len(cells)} cells keep every promise.")
    return 1 if broken else 0


def show(finding: Finding) -> None:
    kept = "; ".join(finding.problems) or "yes"
    name = finding.cell or "none"
    print(
        f"| {name} | {kept} | {finding.attempts} | {finding.redone_steps} | {finding.seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
