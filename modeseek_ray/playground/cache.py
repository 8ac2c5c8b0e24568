"""Where things lie under `home/playground/`, by content hash, and how they get there in one move."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from modeseek_ray.playground.recipe import Recipe, recipe_of

MODEL_SOURCES = (
    "corpus.py",
    "facts.py",
    "mixture.py",
    "model.py",
    "pretrain.py",
    "skills.py",
    "tokenizer.py",
)
MODEL_PACKAGES = ("pycountry", "tokenizers", "torch", "transformers")
DATA_SOURCES = ("corpus.py", "facts.py", "files.py", "mixture.py", "new_task.py", "skills.py")
DATA_PACKAGES = ("pycountry",)


def fingerprint(content: Any, sources: Sequence[str], packages: Sequence[str]) -> str:
    """Twelve hexadecimal digits of SHA-256 over everything that decides a result.

    `content` is JSON-serialisable. Of the sources only the syntax tree counts, so comments and
    formatting do not force a rebuild. Python's own version counts because the text is its library.
    """
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(platform.python_version().encode())
    for package in packages:
        digest.update(f"{package}={version(package)}".encode())
    for source in sources:
        tree = ast.parse((Path(__file__).parent / source).read_text(encoding="utf-8"))
        digest.update(f"{source}={ast.dump(tree)}".encode())
    return digest.hexdigest()[:12]


def model_directory(name: str, home: Path, *, seed: int = 0, recipe: Recipe | None = None) -> Path:
    """Where the model of this recipe and seed lies or will lie."""
    recipe = recipe or recipe_of(name)
    key = fingerprint({"recipe": asdict(recipe), "seed": seed}, MODEL_SOURCES, MODEL_PACKAGES)
    return home / "playground" / f"{name}-seed{seed}-{key}"


def data_directory(home: Path, *, seed: int = 0) -> Path:
    """Where the data files of this seed lie or will lie."""
    key = fingerprint({"seed": seed}, DATA_SOURCES, DATA_PACKAGES)
    return home / "playground" / f"data-seed{seed}-{key}"


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` when the block ends well, and vanishes if not.

    So a reader sees all of it or nothing, and an interrupted build leaves nothing to be mistaken
    for a model.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def build_lock(directory: Path) -> FileLock:
    """One builder per directory: a second process waits, then finds the work done."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(directory.parent / f".{directory.name}.lock")
