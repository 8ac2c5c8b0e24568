"""`make test-documents`: every command of the README's walk and of the user's guide, training included.

Minutes; not part of `make test`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_documents import ROOT, run_blocks

IMPORTING = {"PYTHONPATH": str(ROOT)}  # every command is a process as it is for users


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", ["README.md", "modeseek_ray/GUIDE.md"])
def test_every_command_works(page: str, service: Any, playground_moe: Path, tmp_path: Path) -> None:
    built = service.home / "playground"
    if not built.exists():
        built.symlink_to(playground_moe.parent)
    run_blocks(ROOT / page, service.home, service.url, tmp_path, IMPORTING, trained=True)
    assert (tmp_path / "comparison.html").stat().st_size > 10_000
