"""Where a secret of an installation stands that others than its owner may read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil


def secrets_of(home: Path) -> dict[str, str]:
    """All tokens of a home by the file that holds them: Ray's, the operator's, each attempt's and engine's."""
    found = {"ray": (home / "ray" / "token").read_text().strip()}
    for path in home.rglob("*.json"):
        if path.stat().st_mode & 0o077:
            continue
        held = json.loads(path.read_text())
        if isinstance(held, dict) and "token" in held:
            found[str(path)] = held["token"]
    return found


def leaks(home: Path, processes: Sequence[psutil.Process], events: Sequence[Any]) -> list[str]:
    """One line for each place where a secret is seen: command lines, logs of ours and of Ray, a job's events."""
    secrets = secrets_of(home)
    places = _places(home, processes, events)
    seen = [(place, name) for place, text in places for name in secrets if secrets[name] in text]
    return [f"{place} shows the token of {name}" for place, name in seen]


def _places(
    home: Path, processes: Sequence[psutil.Process], events: Sequence[Any]
) -> Iterator[tuple[str, str]]:
    for process in processes:
        try:
            yield f"the command line of {process.pid}", " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    scratch = Path(json.loads((home / "ray" / "head.json").read_text())["scratch"])
    logs = [*home.rglob("*.log"), *home.rglob("spool.jsonl"), *scratch.glob("session_*/logs/**/*")]
    for path in logs:
        if path.is_file():
            yield str(path), path.read_text(errors="replace")
    yield "the events", json.dumps([str(event) for event in events])
