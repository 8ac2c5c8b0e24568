"""The text of rows by their number, for the report: what a weight was given to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

LONGEST = 600  # characters that are shown of each side


@dataclass(frozen=True)
class RowText:
    """What stood before and what was trained on, cut to a length that can be read."""

    prompt: str
    completion: str


def row_texts(path: Path, rows: Iterable[int]) -> dict[int, RowText]:
    """Texts of the rows with these numbers (counted from 0) of a JSONL or Parquet file.

    A row that cannot be read as text is left out: a report is no place to validate data.
    """
    wanted = {int(row) for row in rows}
    if not wanted:
        return {}
    records = _parquet_records(path, wanted) if _is_parquet(path) else _jsonl_records(path, wanted)
    return {row: text for row, record in records.items() if (text := row_text(record)) is not None}


def row_text(record: Mapping[str, Any]) -> RowText | None:
    """Prompt and answer of a row, as far as it has them as text.

    >>> row_text({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
    RowText(prompt='user: 2+2?', completion='4')
    """
    if "preferred_output" in record:
        given = record.get("input")
        prompt = given.get("messages") if isinstance(given, Mapping) else None
        preferred = record["preferred_output"]
        if not isinstance(prompt, list) or not isinstance(preferred, list):
            return None
        return row_text({"messages": [*prompt, *preferred]})
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        turns = [m for m in messages if isinstance(m, Mapping)]
        if turns and turns[-1].get("role") != "assistant":  # a question that the generator answered
            turns.append({})
        before = [f"{turn.get('role', '?')}: {turn.get('content') or ''}" for turn in turns[:-1]]
        return RowText(_cut("\n".join(before)), _cut(str(turns[-1].get("content") or ""))) if turns else None
    if "completion" in record:
        return RowText(_cut(str(record.get("prompt") or "")), _cut(str(record["completion"])))
    if isinstance(record.get("text"), str):  # the rollouts of another job
        return RowText("", _cut(record["text"]))
    if isinstance(record.get("prompt"), str):
        return RowText(_cut(record["prompt"]), "")
    return None


def _is_parquet(path: Path) -> bool:
    """By its first bytes: a stored upload has no suffix."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _jsonl_records(path: Path, wanted: set[int]) -> dict[int, Mapping[str, Any]]:
    records: dict[int, Mapping[str, Any]] = {}
    last = max(wanted)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for row, line in enumerate(file):
            if row > last:
                break
            if row in wanted:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    records[row] = record
    return records


def _parquet_records(path: Path, wanted: set[int]) -> dict[int, Mapping[str, Any]]:
    file = pq.ParquetFile(path)
    names = [n for n in ("messages", "prompt", "completion", "text") if n in file.schema_arrow.names]
    if not names:
        return {}
    records: dict[int, Mapping[str, Any]] = {}
    start = 0
    for index in range(file.num_row_groups):
        size = file.metadata.row_group(index).num_rows
        here = sorted(row for row in wanted if start <= row < start + size)
        if here:
            table = file.read_row_group(index, columns=names).take([row - start for row in here])
            records |= dict(zip(here, table.to_pylist(), strict=True))
        start += size
    return records
