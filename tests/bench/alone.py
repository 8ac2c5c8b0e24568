"""The environment of a contender: a process of its own, and not a rank of whatever this one has been."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANK_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"}


def environment(threads: int) -> dict[str, str]:
    """This process's, without its rank: TRL would meet the port of a trainer that ran here before."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {
        **inherited,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
