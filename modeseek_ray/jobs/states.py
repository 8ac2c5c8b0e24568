"""Legal states of a job, as one table; history only grows.

    accepted -> validating -> queued -> starting -> running <-> checkpointing
    running -> pausing -> paused -> queued      running -> recovering -> queued (attempt + 1)
    any non-terminal -> cancelling -> cancelled

An attempt may be lost in any state in which a driver lives, so each of those may go to `recovering`.
A job without a driver (`queued`, `recovering`) is paused at once, and one that reaches its last step
before it hears of the pause succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping

TERMINAL = frozenset({"succeeded", "failed", "cancelled", "rejected"})

TRANSITIONS: Mapping[str, frozenset[str]] = {
    "accepted": frozenset({"validating", "cancelling"}),
    "validating": frozenset({"queued", "rejected", "cancelling"}),
    "queued": frozenset({"starting", "paused", "cancelling"}),
    "starting": frozenset({"running", "pausing", "recovering", "failed", "cancelling"}),
    "running": frozenset({"checkpointing", "pausing", "recovering", "succeeded", "failed", "cancelling"}),
    "checkpointing": frozenset({"running", "pausing", "recovering", "failed", "cancelling"}),
    "pausing": frozenset({"paused", "recovering", "succeeded", "failed", "cancelling"}),
    "paused": frozenset({"queued", "cancelling"}),
    "recovering": frozenset({"queued", "paused", "failed", "cancelling"}),
    "cancelling": frozenset({"cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
    "rejected": frozenset(),
}

# A driver process may be alive in these: they count against capacity and are watched by lease.
ATTENDED = frozenset({"starting", "running", "checkpointing", "pausing", "cancelling"})

# The only states a driver may put its job in; it may also give its attempt up (`DriverStore.give_up`).
DRIVER_STATES = frozenset({"running", "checkpointing", "paused", "succeeded", "failed", "cancelled"})

_PUBLIC = {
    "accepted": "validating_files",
    "validating": "validating_files",
    "checkpointing": "running",
    "pausing": "running",
    "cancelling": "running",
    "rejected": "failed",
}
_WAITING = frozenset({"queued", "starting", "recovering"})


def is_legal(source: str, target: str) -> bool:
    """Whether the table has an arrow from `source` to `target`."""
    return target in TRANSITIONS[source]


def public_status(state: str, committed_step: int | None) -> str:
    """The state as OpenAI's clients know it. A job that waits for its next attempt still counts as running.

    >>> public_status("recovering", None), public_status("recovering", 40), public_status("rejected", None)
    ('queued', 'running', 'failed')
    """
    if state in _WAITING:
        return "running" if committed_step else "queued"
    return _PUBLIC.get(state, state)
