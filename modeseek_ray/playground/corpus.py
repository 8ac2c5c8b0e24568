"""Real text: docstrings and code of this Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Well-documented modules and packages of plain Python; a missing one is passed over.
MODULES = (
    "argparse ast base64 bisect calendar codecs collections configparser contextlib copy csv dataclasses datetime "
    "decimal difflib doctest enum filecmp fileinput fnmatch fractions ftplib functools gettext glob gzip hashlib "
    "heapq http inspect io ipaddress json linecache locale logging mailbox mimetypes numbers operator optparse os "
    "pathlib pdb pickle pkgutil platform plistlib pprint pydoc queue random re reprlib sched selectors shelve shlex "
    "shutil smtplib socket statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace "
    "traceback types typing unittest urllib uuid warnings weakref zipfile"
).split()
SHORTEST, LONGEST = 80, 600  # characters of a document
HELD_OUT_SHARE = 16  # one document in 16 is never trained on


def is_held_out(document: str) -> bool:
    """Whether this document is kept from training: decided by its content alone."""
    return zlib.crc32(document.encode()) % HELD_OUT_SHARE == 0


@cache
def documents() -> tuple[str, ...]:
    """Docstrings and function bodies of 80 to 600 characters, ASCII, each once, in a fixed order."""
    found: dict[str, None] = {}
    for path in _sources():
        source = path.read_text(encoding="utf-8", errors="ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for text in _pieces(source, tree):
            if SHORTEST <= len(text) <= LONGEST and text.isascii():
                found[text] = None
    return tuple(found)


def training_documents() -> tuple[str, ...]:
    return tuple(d for d in documents() if not is_held_out(d))


def held_out_documents() -> tuple[str, ...]:
    return tuple(d for d in documents() if is_held_out(d))


def _sources() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        module = library / f"{name}.py"
        if module.is_file():
            yield module
        else:
            yield from sorted(p for p in (library / name).rglob("*.py") if "test" not in p.parts)


def _pieces(source: str, tree: ast.Module) -> Iterator[str]:
    """Docstrings (cut at blank lines so that most fit) and the code of short functions."""
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield from (part.strip() for part in docstring.split("\n\n"))
        if isinstance(node, ast.FunctionDef):
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip()
