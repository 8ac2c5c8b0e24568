"""Small real models and data sets made on this machine, for the demo, tests and benchmarks.

Two models of about a million parameters, pre-trained from scratch in a few minutes on the standard
library's text, a few dozen facts and exactly checkable skills, and the files of a new task that
makes them forget. `build(name, home)` in `build.py` makes a model; the names here only look things
up and load neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("moe", "dense")


def locate(name: str, home: Path, *, seed: int = 0) -> Path | None:
    """The directory of a built model, None if today's recipe has not been built.

    The path carries a hash of everything that decides the weights, so a model made by an older
    recipe is never returned. Raises `ModelError` for a name that is not in `NAMES`.
    """
    from modeseek_ray.playground.cache import model_directory

    directory = model_directory(name, home, seed=seed)
    return directory if directory.is_dir() else None


def data_files(home: Path, *, seed: int = 0) -> dict[str, Path]:
    """The data files by name (`new-task.train`, `old-tasks.retention`, …), written on first use.

    They do not depend on a model: all base models are compared on the same rows.
    """
    from modeseek_ray.playground.files import data_files as write_once

    return write_once(home, seed=seed)
