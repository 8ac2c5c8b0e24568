"""When the driver's process ends its work from outside, rather than waiting for the loop to look."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from actors import http_sink
from actors.attempts import paths_as_written
from actors.commands import drive
from modeseek_ray.config import parse_config
from modeseek_ray.errors import (
    ConfigError,
    DataError,
    ModelError,
    NumericsError,
    RoutingError,
    ServiceError,
    StorageError,
    WorkerError,
)
from modeseek_ray.jobs.paths import Home
from modeseek_ray.rewards.grader import GraderError

TOLD: dict[str, Any] = {"lease_s": 60.0, "deadlines_s": {}}  # by the secret file


class Wish:
    """What `_stopped` reads of a sink."""

    def __init__(self, desired: str, section: str | None) -> None:
        self._desired = desired
        self.section = section

    def desired(self) -> str:
        return self._desired


async def _ending(desired: str, section: str | None) -> str | None:
    """The state to end in, or None where the loop is left to end by itself."""
    sink: Any = Wish(desired, section)
    try:
        return await asyncio.wait_for(drive._stopped(sink), 0.5)
    except TimeoutError:
        return None


@pytest.mark.parametrize(
    ("desired", "section", "state"),
    [
        ("run", "score", None),
        ("pause", None, "paused"),
        ("pause", "score", "paused"),  # nothing is trained yet: scoring may take hours
        ("pause", "setup", "paused"),
        ("pause", "step", None),  # the loop saves a checkpoint first
        ("pause", "checkpoint", None),
        ("cancel", "step", "cancelled"),
    ],
)
async def test_a_pause_is_left_to_the_loop_once_there_is_something_to_save(
    monkeypatch: pytest.MonkeyPatch, desired: str, section: str | None, state: str | None
) -> None:
    monkeypatch.setattr(drive, "CANCEL_GRACE_S", 0.0)
    assert await _ending(desired, section) == state


async def test_a_driver_whose_lease_is_lost_ends_its_work_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another attempt may be running: it neither goes on nor reports a failure."""
    ended, said = asyncio.Event(), []

    class Away:
        """A service that never answers."""

        async def heartbeat(self, progress: Any) -> str:
            raise ServiceError("away.", code="unreachable", http_status=503)

        async def transition(self, to: str, **_: Any) -> None:
            said.append(to)

    async def work(*_: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(http_sink, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(drive, "_work", work)
    home = Home(tmp_path)
    home.attempt("ftjob-1", 1).mkdir(parents=True)
    client: Any = Away()
    assert await asyncio.wait_for(drive._drive(client, home, "ftjob-1", 1, {**TOLD, "lease_s": 0.1}), 10) == 1
    assert (ended.is_set(), said) == (True, [])


class Listening:
    """A service that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str | None]] = []  # state, code of the error

    async def heartbeat(self, progress: Any) -> str:
        return "run"

    async def events(self, events: Any) -> int:
        return int(events[-1]["seq"])

    async def transition(self, to: str, error: Any = None, **_: Any) -> None:
        self.said.append((to, error and error["code"]))


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        # A new attempt may do better.
        (WorkerError("rank 1 died.", code="worker_died"), "recovering", "worker_died"),
        (WorkerError("rank 1 raised ValueError."), "recovering", "worker_failed"),
        (WorkerError("no room.", code="no_resources"), "recovering", "no_resources"),
        (ServiceError("away.", code="unreachable", http_status=503), "recovering", "unreachable"),
        (TimeoutError("a collective"), "recovering", "internal_error"),
        (RayError("the cluster is gone"), "recovering", "internal_error"),
        (ZeroDivisionError("ours"), "recovering", "internal_error"),
        (MemoryError(), "recovering", "out_of_memory"),
        # It goes on when there is space.
        (OSError(errno.ENOSPC, "No space left on device"), "paused", "disk_full"),
        (StorageError("no room for a checkpoint.", code="disk_full"), "paused", "disk_full"),
        # A new attempt would come to the same end.
        (StorageError("the checkpoint is damaged."), "failed", "storage"),
        (StorageError("a node is blind.", code="storage_not_shared"), "failed", "storage_not_shared"),
        (ConfigError("no experts to adapt."), "failed", "invalid_config"),
        (DataError("an empty completion.", code="empty_completion"), "failed", "empty_completion"),
        (ModelError("no tokenizer.", code="no_tokenizer"), "failed", "no_tokenizer"),
        (NumericsError("the loss is nan."), "failed", "numerics"),
        (RoutingError("other experts."), "failed", "routing"),
        (GraderError("half have no grade."), "failed", "grader_failing"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_only_what_would_come_again_fails_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, state: str, code: str
) -> None:
    async def work(*_: Any) -> None:
        raise error

    monkeypatch.setattr(drive, "_work", work)
    home, service = Home(tmp_path), Listening()
    home.attempt("ftjob-1", 1).mkdir(parents=True)
    client: Any = service
    assert await drive._drive(client, home, "ftjob-1", 1, TOLD) == 0
    assert service.said == [(state, code)]


async def test_giving_up_is_said_once_more_where_the_answer_was_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first time voids the fence, so the second is refused: the driver has been heard, and ends well."""

    class Deaf(Listening):
        async def transition(self, to: str, error: Any = None, **_: Any) -> None:
            await super().transition(to, error)
            lost = len(self.said) == 1
            code, status = ("unreachable", 503) if lost else ("stale_fence", 403)
            raise ServiceError("no.", code=code, http_status=status)

    async def work(*_: Any) -> None:
        raise WorkerError("rank 1 died.", code="worker_died")

    monkeypatch.setattr(drive, "_work", work)
    monkeypatch.setattr(http_sink, "RETRY_S", 0.01)
    home, service = Home(tmp_path), Deaf()
    home.attempt("ftjob-1", 1).mkdir(parents=True)
    client: Any = service
    assert await drive._drive(client, home, "ftjob-1", 1, TOLD) == 0
    assert service.said == [("recovering", "worker_died")] * 2


async def test_an_attempt_that_had_nothing_left_to_train_says_that_it_runs_before_it_succeeds(
    tmp_path: Path,
) -> None:
    """Killed in the export, resumed at the last step: the state table has no way from starting to succeeded."""
    service: Any = Listening()
    sink = http_sink.HttpSink(service, tmp_path / "spool.jsonl")
    outcome = SimpleNamespace(ended="run", state=SimpleNamespace(trained_tokens=1))
    result: Any = SimpleNamespace(outcome=outcome, model_path=Path("/m"), result_files=[], picked={})
    await drive._conclude(sink, result)
    assert service.said == [("running", None), ("succeeded", None)]


@pytest.mark.parametrize("kind", ["supervised", "weighted", "dpo"])
def test_what_a_worker_refuses_is_named_as_the_job_has_it(kind: str) -> None:
    config = parse_config({"model": "m", "training_file": "f", "method": {"type": kind}})
    experts = "method.weighted.training.lora.target_experts"
    with pytest.raises(ConfigError) as caught, paths_as_written(config):
        raise ConfigError("no experts.", param=experts)
    assert caught.value.param == f"method.{kind}.training.lora.target_experts"
    with pytest.raises(WorkerError) as bare, paths_as_written(config):
        raise WorkerError("rank 1 died.")
    assert bare.value.param is None
