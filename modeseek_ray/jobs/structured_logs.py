"""Structured logs: one JSON object a line, with the job, the attempt and the request it is about.

`about(job=…, attempt=…)` marks everything that is logged inside it, also in the tasks it starts.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

_about: ContextVar[Mapping[str, str | int]] = ContextVar("about", default={})  # noqa: B039  never mutated


@contextmanager
def about(**facts: str | int) -> Iterator[None]:
    """What is logged in this block concerns this job, attempt or request."""
    token = _about.set({**_about.get(), **facts})
    try:
        yield
    finally:
        _about.reset(token)


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", …}`; a traceback is one string."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **getattr(record, "about", {}),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class PlainLines(logging.Formatter):
    """For people: time, level, what it is about, message."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={value}" for name, value in getattr(record, "about", {}).items())
        record.facts = f"[{facts}] " if facts else ""
        return super().format(record)


def configure(form: Literal["text", "json"] = "text", level: int = logging.INFO) -> None:
    """Log to standard error, in one of the two forms. Call once, in a process that is ours."""
    handler = logging.StreamHandler(sys.stderr)
    plain = PlainLines("%(asctime)s %(levelname)s %(facts)s%(message)s")
    handler.setFormatter(JsonLines() if form == "json" else plain)
    handler.addFilter(_note)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "alembic", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _note(record: logging.LogRecord) -> bool:
    """Where it was logged is known here and now; the formatter may run elsewhere."""
    record.about = dict(_about.get())
    return True
