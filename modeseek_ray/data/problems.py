"""What is wrong with a data file: every kind counted, some examples of each kept.

The kinds are the codes of the `DataError`s that the readers raise, for example `malformed_json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modeseek_ray.errors import DataError

EXAMPLES_PER_KIND = 20


@dataclass(frozen=True)
class Problem:
    """One bad row. `line` counts from 1: lines of JSONL, records of Parquet; None = the whole file."""

    kind: str
    file: str
    line: int | None
    message: str
    mend: str

    def error(self) -> DataError:
        return DataError(self.message, mend=self.mend, file=self.file, line=self.line, code=self.kind)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "file": self.file,
            "line": self.line,
            "message": self.message,
            "mend": self.mend,
        }


class Problems:
    """Collects the problems of one file in the order they are found.

    >>> problems = Problems("a.jsonl")
    >>> problems.add(DataError("an empty completion.", code="empty_completion"), line=3)
    >>> problems.counts["empty_completion"], problems.examples[0].line
    (1, 3)
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.counts: Counter[str] = Counter()
        self.examples: list[Problem] = []

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, error: DataError, line: int | None = None) -> None:
        self.counts[error.code] += 1
        if self.counts[error.code] <= EXAMPLES_PER_KIND:
            self.examples.append(Problem(error.code, self.file, line, error.message, error.mend))


def raise_first(files: Iterable[Problems]) -> None:
    """Raise the first problem as a DataError that counts the others; do nothing if there is none."""
    bad = [problems for problems in files if problems]
    if not bad:
        return
    first = bad[0].examples[0]
    counts = sum((problems.counts for problems in bad), Counter[str]())
    total = counts.total()
    summary = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    more = "" if total == 1 else f" (of {total} problems in all: {summary})"
    raise DataError(
        f"{first.message.rstrip('.')}{more}.",
        mend=first.mend,
        file=first.file,
        line=first.line,
        code=first.kind,
    )
