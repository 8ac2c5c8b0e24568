"""`python -m modeseek_ray.playground moe`: make a playground model and its data files."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from modeseek_ray.errors import ModeseekError
from modeseek_ray.playground import NAMES, data_files


def main(arguments: list[str] | None = None) -> int:
    """Build, print where things are. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m modeseek_ray.playground",
        description="Pre-train a small real model on this machine (about 3 minutes) and write its data files. "
        "What is already there is kept.",
    )
    parser.add_argument(
        "names", nargs="*", choices=NAMES, default=["moe"], metavar="NAME", help=" or ".join(NAMES)
    )
    parser.add_argument(
        "--home",
        type=Path,
        default=_storage(),
        help="where models lie (default: $MODESEEK_STORAGE, $MODESEEK_HOME or ~/.modeseek)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed makes another base model (default: 0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)

    from modeseek_ray.playground.build import build

    try:
        for name in options.names:
            print(build(name, options.home, seed=options.seed, progress=not options.quiet))
        for path in data_files(options.home).values():
            print(path)
    except ModeseekError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _storage() -> Path:
    """As `jobs.paths.Home` has it."""
    named = os.environ.get("MODESEEK_STORAGE") or os.environ.get("MODESEEK_HOME")
    return Path(named or "~/.modeseek").expanduser()


if __name__ == "__main__":
    sys.exit(main())
