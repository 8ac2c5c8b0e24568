"""Files to records: JSON Lines and Parquet, one record at a time, refusing what is not strictly sound.

Memory stays bounded whatever is uploaded: a line is never held beyond `MAX_LINE_BYTES`, Parquet is
read in small batches. A bad record is yielded as its `DataError`, so that one pass finds them all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from modeseek_ray.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
"""Longest line or Parquet record: about four million tokens of text."""
MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a record."""

Record = dict[str, Any]
_CHUNK_BYTES = 2**20
_PARQUET_ROWS = 256
_PARQUET_MAGIC = b"PAR1"
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def read_records(path: Path | str) -> Iterator[tuple[int, Record | DataError]]:
    """Yield (number, record), or (number, what is wrong with it).

    Numbers count from 0: the line in JSONL (blank lines are skipped but counted), the record in
    Parquet. A byte-order mark and CRLF line ends are tolerated. Raises DataError if the file is not
    there or is not Parquet although it ends like it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == _PARQUET_MAGIC or path.suffix == ".parquet"
            file.seek(0)
            yield from _read_parquet(file) if is_parquet else _read_jsonl(file)
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}.",
            file=str(path),
            mend="Check the path.",
            code="unreadable",
        ) from None


def parse_line(line: bytes) -> Record:
    """One JSON object, strictly: valid UTF-8, no duplicate keys, no NaN, integers that fit 64 bits.

    Raises DataError with a code per kind of fault.

    >>> parse_line(b'{"prompt": "a", "completion": "b"}')
    {'prompt': 'a', 'completion': 'b'}
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = (
            " (it looks like UTF-16)" if line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line[:16] else ""
        )
        raise DataError(
            f"byte {error.start + 1} of the line is not valid UTF-8{utf16}.",
            mend="Save the file as UTF-8.",
            code="not_utf8",
        ) from None
    try:
        record = _DECODER.decode(text)
        if line.count(b"{") + line.count(b"[") > MAX_DEPTH and _depth(record) > MAX_DEPTH:
            raise RecursionError
        if _SURROGATE_ESCAPE.search(line):
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not valid JSON: {error.msg} at column {error.colno}.",
            mend="Write one JSON object per line.",
            code="malformed_json",
        ) from None
    except RecursionError:
        raise DataError(
            f"is nested deeper than {MAX_DEPTH} levels.", mend="Flatten the record.", code="too_deep"
        ) from None
    except UnicodeEncodeError:
        raise DataError(
            "holds a lone surrogate (half of a character, such as \\ud800).",
            mend="Remove it, or write the whole character.",
            code="lone_surrogate",
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"is a JSON {_json_name(record)}, not an object.",
            mend='Write one object per line, like {"prompt": …, "completion": …}.',
            code="not_an_object",
        )
    return record


def _read_jsonl(file: BinaryIO) -> Iterator[tuple[int, Record | DataError]]:
    for number, line in enumerate(_bounded_lines(file)):
        if isinstance(line, int):
            yield number, _too_long("the line", line)
            continue
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, parse_line(line)
        except DataError as error:
            yield number, error


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | int]:
    """Lines without their ends; of a line over the limit only its length, in bytes."""
    buffer, skipped = b"", 0
    while chunk := file.read(_CHUNK_BYTES):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            length = skipped + len(buffer) + len(line)
            yield buffer + line if length <= MAX_LINE_BYTES else length
            buffer, skipped = b"", 0
        if skipped + len(buffer) + len(rest) > MAX_LINE_BYTES:
            skipped, buffer = skipped + len(buffer) + len(rest), b""
        else:
            buffer += rest
    if skipped or buffer:
        yield skipped or buffer


def unpacked_bytes(path: Path) -> int:
    """What a Parquet file says it holds, unpacked; 0 for one that says nothing. A small file may hold a lot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            if file.read(4) != _PARQUET_MAGIC:
                return 0
            footer = pq.ParquetFile(file).metadata
            return sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    except (pa.ArrowException, OSError, ValueError, OverflowError):
        return 0


def _read_parquet(file: BinaryIO) -> Iterator[tuple[int, Record | DataError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS):
            for record in batch.to_pylist():
                yield number, _checked_record(record)
                number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"is not a sound Parquet file: {reason}."
        yield number, DataError(message, mend="Write it again, or send JSON Lines.", code="bad_parquet")


def _checked_record(record: Record) -> Record | DataError:
    """Drop nulls, which Parquet has for every absent field, and refuse what JSON would not allow."""
    pending: list[tuple[Any, int]] = [(record, 1)]
    num_bytes = 0
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            return DataError(
                f"is nested deeper than {MAX_DEPTH} levels.", mend="Flatten the record.", code="too_deep"
            )
        if isinstance(value, dict):
            for key in [k for k, v in value.items() if v is None]:
                del value[key]
            pending.extend((v, depth + 1) for v in value.values())
        elif isinstance(value, list):
            pending.extend((v, depth + 1) for v in value)
        elif isinstance(value, str):
            num_bytes += len(value)
    return record if num_bytes <= MAX_LINE_BYTES else _too_long("the record", num_bytes)


def _too_long(what: str, num_bytes: int) -> DataError:
    return DataError(
        f"{what} has {num_bytes / 2**20:.1f} MiB, more than the {MAX_LINE_BYTES // 2**20} MiB of a row.",
        mend="Put each row on a line of its own, or shorten it.",
        code="line_too_long",
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(
            f"the key {twice[:64]!r} appears twice.", mend="Keep one of them.", code="duplicate_key"
        )
    return record


def _bounded_int(digits: str) -> int:
    if len(digits) > 19 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise DataError(
            f"the integer {digits[:24]}{'…' if len(digits) > 24 else ''} does not fit 64 bits.",
            mend="Write it as a string if it is a label.",
            code="huge_integer",
        )
    return value


def _finite_float(digits: str) -> float:
    """Python reads 1e999 as infinity, which JSON does not have."""
    value = float(digits)
    if not math.isfinite(value):
        raise _not_finite(digits[:24])
    return value


def _no_constant(name: str) -> None:
    raise _not_finite(name)


def _not_finite(what: str) -> DataError:
    return DataError(
        f"{what} is not JSON and not a usable number.",
        mend="Drop the field, or write a finite number.",
        code="not_finite",
    )


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=_bounded_int,
    parse_float=_finite_float,
    parse_constant=_no_constant,
)


def _depth(value: Any) -> int:
    deepest, pending = 0, [(value, 1)]
    while pending and deepest <= MAX_DEPTH:
        item, depth = pending.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, depth)
            pending.extend((v, depth + 1) for v in (item.values() if isinstance(item, dict) else item))
    return deepest


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")
