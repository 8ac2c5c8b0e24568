"""The state table against the picture of it, arrow by arrow."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from modeseek_ray.jobs.errors import IllegalTransitionError
from modeseek_ray.jobs.records import EventDraft
from modeseek_ray.jobs.states import TERMINAL, TRANSITIONS, is_legal, public_status
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.tables import jobs

DRAWN = """
accepted validating | validating queued | queued starting | starting running | running checkpointing
checkpointing running | running pausing | pausing paused | paused queued | running recovering
recovering queued | validating rejected | starting failed | running failed | recovering failed
running succeeded | cancelling cancelled
starting recovering | checkpointing recovering | pausing recovering
checkpointing failed | pausing failed
queued paused | recovering paused | starting pausing | checkpointing pausing | pausing succeeded
"""


def test_the_table_is_what_was_drawn() -> None:
    drawn = {tuple(arrow.split()) for arrow in DRAWN.replace("\n", "|").split("|") if arrow.strip()}
    drawn |= {(state, "cancelling") for state in TRANSITIONS if state not in TERMINAL | {"cancelling"}}
    assert {(source, target) for source, targets in TRANSITIONS.items() for target in targets} == drawn


def test_terminal_states_have_no_way_out_and_all_others_do() -> None:
    assert {state for state, targets in TRANSITIONS.items() if not targets} == TERMINAL


@pytest.mark.parametrize(
    ("state", "committed_step", "status"),
    [
        ("accepted", None, "validating_files"),
        ("validating", None, "validating_files"),
        ("queued", None, "queued"),
        ("starting", None, "queued"),
        ("starting", 4, "running"),
        ("recovering", 4, "running"),
        ("queued", 4, "running"),
        ("running", None, "running"),
        ("checkpointing", None, "running"),
        ("pausing", 4, "running"),
        ("cancelling", None, "running"),
        ("paused", 4, "paused"),
        ("rejected", None, "failed"),
        ("failed", 4, "failed"),
        ("succeeded", 9, "succeeded"),
        ("cancelled", None, "cancelled"),
    ],
)
def test_public_status(state: str, committed_step: int | None, status: str) -> None:
    assert public_status(state, committed_step) == status


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TRANSITIONS, TRANSITIONS)))
def test_the_store_allows_exactly_the_table(
    source: str, target: str, shared_store: Store, helpers: Any
) -> None:
    """All 196 pairs, each on a row put into `source` by hand."""
    job = helpers.submit(shared_store, f"ftjob-{source}-{target}")
    with shared_store.database.write() as connection:
        connection.execute(sqlalchemy.update(jobs).where(jobs.c.id == job.id).values(state=source))
    job = shared_store.jobs.get(job.id)
    if is_legal(source, target):
        moved = shared_store.jobs.move(job, target, EventDraft("moved"))
        assert (moved.state, moved.version) == (target, job.version + 1)
        assert (moved.finished_at is not None) == (target in TERMINAL)
        return
    with pytest.raises(IllegalTransitionError, match=f"is {source} and cannot become {target}"):
        shared_store.jobs.move(job, target, EventDraft("moved"))
    assert shared_store.jobs.get(job.id) == job


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("store")
    store = Store(f"sqlite:///{directory / 'store.sqlite3'}")
    yield store
    store.close()
