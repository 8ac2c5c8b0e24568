"""What a driver had written down for the service and could not deliver before it died.

`HttpSink` appends each event to the attempt's `spool.jsonl` before it sends it. When the attempt is over,
what the store has not got is read from there, so that a driver killed while the service was away takes
nothing of the job's history with it. Where the service does not see the driver's disk there is no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeseek_ray.jobs.records import EventDraft

_MAX_MESSAGE = 100_000


def undelivered(spool: Path, attempt: int, after: int) -> list[EventDraft]:
    """The events of `spool` that follow number `after`, as far as they are whole and without a gap.

    A kill may have cut the last line in the middle, a full disk may have left one out.
    """
    found: list[EventDraft] = []
    for event in _lines(spool):
        if event["seq"] <= after:
            continue
        if event["seq"] != after + len(found) + 1:
            break
        found.append(_draft(event, attempt))
    return found


def _lines(spool: Path) -> Iterator[dict[str, Any]]:
    try:
        with spool.open(encoding="utf-8") as file:
            for line in file:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event.get("seq"), int):
                    return
                yield event
    except (OSError, ValueError):
        return


def _draft(event: dict[str, Any], attempt: int) -> EventDraft:
    level, data, created_at = event.get("level"), event.get("data"), event.get("created_at")
    return EventDraft(
        message=str(event.get("message", ""))[:_MAX_MESSAGE],
        level=level if level in ("info", "warn", "error") else "info",
        type="metrics" if event.get("type") == "metrics" else "message",
        data=data if isinstance(data, dict) else {},
        created_at=created_at if isinstance(created_at, float) else None,
        attempt=attempt,
        attempt_sequence=event["seq"],
    )
