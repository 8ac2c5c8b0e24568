"""A driver killed while the service was away: what it had written down is in the history afterwards."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.network import free_port
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.records import EventDraft
from modeseek_ray.jobs.spool import undelivered
from modeseek_ray.jobs.store import Store

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from actors.http_sink import HttpSink
from modeseek_ray.client import AttemptClient

async def work():
    client = AttemptClient(f"http://127.0.0.1:{sys.argv[2]}", "ftjob-one", 1, token="t", fence=1)
    sink = HttpSink(client, Path(sys.argv[1]))
    sink.start()
    for step in (1, 2, 3, 4):
        sink.emit({"type": "metrics", "message": f"step {step}", "created_at": 5.0, "data": {"step": step}})
    await asyncio.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(work())
"""


@pytest.fixture
def store_url(either_url: str) -> str:
    return either_url


async def test_events_of_a_driver_killed_while_the_service_was_away_are_found_later(
    store: Store, home: Any, launcher: Any, validator: Any, helpers: Any
) -> None:
    """Two of its four events had been delivered before; the rest comes before the loss, and none twice."""
    job, bearer = helpers.start(store)
    spool = home.spool(job.id, 1)
    spool.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", KILLED, str(spool), str(free_port())]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    with spool.open("a") as file:
        file.write('{"seq": 5, "mess')  # cut by the kill
    store.drivers.transition(bearer, "running")
    early = [EventDraft(f"step {n}", attempt=1, attempt_sequence=n) for n in (1, 2)]
    store.drivers.append_events(bearer, early)
    store.attempts.launched(job.id, 1, "gone")
    launcher.statuses["gone"] = "failed"

    reconciler = Reconciler(
        store, home, launcher, validator, url="http://x", settings=ReconcilerSettings(status_every_s=0)
    )
    await reconciler.reconcile()
    while tasks := list(reconciler._tasks.values()):
        await asyncio.wait(tasks)
    events = store.events.after(job.id, 0)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    of_driver = [event.message for event in events if event.message.startswith("step")]
    assert of_driver == ["step 1", "step 2", "step 3", "step 4"]
    lost = next(i for i, event in enumerate(events) if event.data.get("state") == "recovering")
    assert events[lost - 1].message == "step 4" and events[lost - 1].data == {"step": 4}


def test_a_spool_is_read_up_to_its_first_gap(tmp_path: Path) -> None:
    spool = tmp_path / "spool.jsonl"
    spool.write_text("".join(json.dumps({"seq": n, "message": str(n)}) + "\n" for n in (1, 2, 3, 5, 6)))
    assert [(d.message, d.attempt_sequence) for d in undelivered(spool, 7, 1)] == [("2", 2), ("3", 3)]
    assert undelivered(spool, 7, 3) == [] and undelivered(tmp_path / "none", 7, 0) == []
