"""From a file's records to its sound rows, whatever a row is: one pass, every problem with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from modeseek_ray.data.problems import Problems
from modeseek_ray.data.reader import Record, read_records
from modeseek_ray.errors import DataError


class Named(Protocol):
    """A row that may have an id of its own."""

    @property
    def id(self) -> str | int | None: ...


R = TypeVar("R", bound=Named)


def parse_records(path: Path | str, problems: Problems, parse: Callable[[int, Record], R]) -> Iterator[R]:
    """What `parse(number, record)` makes of each record, numbered from 0.

    A `DataError`, an id that was used before, a file without rows or one that cannot be read go into
    `problems`; the rows around a bad one are yielded all the same.
    """
    seen: dict[str | int, int] = {}
    num_records = 0
    try:
        for number, record in read_records(path):
            num_records += 1
            try:
                if isinstance(record, DataError):
                    raise record
                row = parse(number, record)
                if row.id is not None and (first := seen.setdefault(row.id, number)) != number:
                    raise DataError(
                        f"the id {str(row.id)[:64]!r} was used before, in line {first + 1}.",
                        mend="Give each row an id of its own, or none.",
                        code="duplicate_id",
                    )
            except DataError as error:
                problems.add(error, number + 1)
            else:
                yield row
    except DataError as error:  # the file as a whole
        problems.add(error)
        return
    if num_records == 0:
        problems.add(DataError("the file has no rows.", mend="Add rows.", code="empty_file"))
