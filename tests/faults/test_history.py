"""The history checker finds what it is there to find: each test breaks one thing in a sound history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from modeseek_ray.jobs.records import EventDraft
from modeseek_ray.jobs.store import Store
from tests.faults import history
from tests.faults.history import Attempt, ClientLog, Event, Stored

SOUND = Stored(
    "ftjob-1",
    "succeeded",
    [Attempt(1, 1, 10.0, 20.0), Attempt(2, 3, 21.0, 30.0)],
    [
        Event(1, 9.0, None, {"state": "accepted"}),
        Event(2, 11.0, 1, {"step": 1, "loss": 2.0}),
        Event(3, 12.0, 1, {"step": 2, "loss": 2.0}),
        Event(4, 20.0, 1, {"state": "recovering"}),
        Event(5, 22.0, 2, {"step": 2, "loss": 2.0}),
        Event(6, 30.0, 2, {"state": "succeeded"}),
    ],
)
LOG = ClientLog(seen={"ftjob-1": [f"ftevent-1-{i}" for i in range(1, 7)]})


def problems(**changes: Any) -> list[str]:
    return list(history.job_problems(replace(SOUND, **changes), LOG))


def test_a_sound_history_has_no_problems() -> None:
    assert problems() == []
    assert list(history.step_problems(SOUND, steps=2, checkpoint_every=1)) == []


def test_a_gap_and_a_doubled_event_are_found() -> None:
    assert any("missing or doubled" in p for p in problems(events=SOUND.events[:2] + SOUND.events[3:]))
    assert any("missing or doubled" in p for p in problems(events=[SOUND.events[0], *SOUND.events]))


def test_an_event_that_the_client_saw_and_the_store_has_not_is_found() -> None:
    assert any("client saw" in p for p in problems(events=SOUND.events[:5], state="running"))


def test_something_after_the_end_is_found() -> None:
    late = Event(7, 31.0, 2, {"step": 3, "loss": 1.0})
    assert any("one end" in p for p in problems(events=[*SOUND.events, late]))


def test_two_live_attempts_are_found() -> None:
    first, second = SOUND.attempts
    assert any("same time" in p for p in problems(attempts=[replace(first, ended_at=25.0), second]))
    assert any("same time" in p for p in problems(attempts=[replace(first, ended_at=None), second]))
    assert any("fence" in p for p in problems(attempts=[first, replace(second, fence=1)]))


def test_a_word_of_an_attempt_that_was_over_is_found() -> None:
    events = [*SOUND.events[:4], replace(SOUND.events[4], attempt=2), replace(SOUND.events[5], attempt=1)]
    assert any("was over" in p for p in problems(events=events))


def test_steps_that_are_missing_or_redone_too_often_are_found() -> None:
    assert any("steps in" in p for p in history.step_problems(SOUND, steps=3, checkpoint_every=1))
    again = replace(SOUND, events=[*SOUND.events[:5], replace(SOUND.events[1], sequence=6)])
    assert any("twice" in p for p in history.step_problems(again, steps=2, checkpoint_every=1))


def test_submissions_missing_doubled_or_under_another_key_are_found(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = Store(f"sqlite:///{path}")
    store.jobs.submit("ftjob-1", {"model": "m"}, idempotency_key="one", body_sha256="x")
    store.jobs.submit("ftjob-2", {"model": "m"}, idempotency_key="two", body_sha256="x")
    store.events.add("ftjob-1", EventDraft("hello", data={"step": 1, "loss": 0.5}))
    both = {"one": "ftjob-1", "two": "ftjob-2"}

    def found(answered: dict[str, str]) -> list[str]:
        return list(history.submission_problems(ClientLog(answered), path))

    assert found(both) == []
    assert any("never answered" in p for p in found({"one": "ftjob-1"}))
    assert any("missing" in p for p in found({**both, "three": "ftjob-3"}))
    assert any("leads to" in p for p in found({**both, "two": "ftjob-1"}))
    stored = history.read(path, "ftjob-1")
    assert (stored.state, [step for _, step in stored.steps]) == ("accepted", [1])
    store.close()
