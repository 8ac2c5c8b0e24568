"""`modeseek drive`: one attempt at a job, as the Ray job that the service starts.

Everything this process needs to know comes from the service, through a secret that only its owner
can read; the command line carries ids and paths alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.attempt_spec import AttemptResult, AttemptSpec
from actors.attempts import attempt_of, paths_as_written
from actors.cluster import RayPlacement, check_nodes, connect
from actors.endings import would_come_again
from actors.fetching import fetch_missing
from actors.http_sink import LEASE_S, HttpSink, LeaseLost
from actors.journal import ResultJournal
from actors.nodes import marked
from actors.trackers import trackers_of
from modeseek_ray.client import AttemptClient
from modeseek_ray.errors import ModeseekError, StorageError, is_full, is_out_of_memory, out_of_memory
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.jobs.structured_logs import about, configure
from modeseek_ray.rewards.endpoints import read_endpoints

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 3.0
BEFORE_THE_LOOP = ("score", "setup")  # sections of `Attempt` and `Driver` in which nothing was trained yet


def drive(job_id: str, attempt: int, secret: Path, home: Path) -> int:
    """Run the attempt. The exit code says whether it ended in a state the service knows of."""
    configure("text")
    credentials = _credentials(secret)
    client = AttemptClient(
        credentials["url"], job_id, attempt, token=credentials["token"], fence=credentials["fence"]
    )
    with about(job=job_id, attempt=attempt):
        return asyncio.run(_drive(client, Home(home), job_id, attempt, credentials))


def _credentials(secret: Path) -> dict[str, Any]:
    """Raises `StorageError` on a node that does not see the storage: without them the service cannot be told."""
    try:
        found: dict[str, Any] = json.loads(secret.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"the node {socket.gethostname()}, on which drivers start, cannot read it ({error.strerror}).",
            file=str(secret),
            mend="Every node must see MODESEEK_STORAGE (or MODESEEK_HOME) at the same path, as the same user.",
            code="storage_not_shared",
        ) from None
    return found


async def _drive(client: AttemptClient, home: Home, job_id: str, number: int, told: Mapping[str, Any]) -> int:
    sink = HttpSink(
        client, home.attempt(job_id, number) / "spool.jsonl", lease_s=told.get("lease_s", LEASE_S)
    )
    sink.start()
    work = asyncio.create_task(_work(client, sink, home, job_id, number, told.get("deadlines_s", {})))
    lost = asyncio.create_task(sink.lost())
    stopped = asyncio.create_task(_stopped(sink))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
    try:
        await asyncio.wait([work, lost, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        await work
    except asyncio.CancelledError:
        if not stopped.done():
            log.error("ended from outside, or the lease is lost: another attempt may be running")
            return 1
        await sink.transition(stopped.result())
    except LeaseLost as error:
        log.error("%s", error)
        return 1
    except ModeseekError as error:
        log.error("the attempt ends: %s", error, exc_info=error)
        await _end(sink, error)
    except Exception as error:
        log.exception("the attempt ends")
        await _end(sink, _named(error))
    finally:
        lost.cancel()
        stopped.cancel()
        await sink.close()
    return 0


async def _end(sink: HttpSink, error: ModeseekError) -> None:
    """A full disk pauses the job, what would come again fails it, and all else costs the attempt alone."""
    if is_full(error):
        await sink.transition("paused", error=_wire_error(error))
    elif would_come_again(error):
        await sink.transition("failed", error=_wire_error(error))
    else:
        with suppress(LeaseLost):  # said again after a lost answer it is stale, and has been heard
            await sink.transition("recovering", error=_wire_error(error))


async def _stopped(sink: HttpSink) -> str:
    """Returns the state to end in, when the work must be ended from outside.

    The loop looks once a step what is desired. A cancelled job is given time to get there; a pause
    waits for it as long as it takes (the service has the deadline), except before the first step:
    scoring a data set may take hours, and there is nothing to save yet.
    """
    while True:
        if sink.desired() == "cancel":
            await asyncio.sleep(CANCEL_GRACE_S)
            return "cancelled"
        if sink.desired() == "pause" and sink.section in (None, *BEFORE_THE_LOOP):
            return "paused"
        await asyncio.sleep(0.2)


async def _work(
    client: AttemptClient,
    sink: HttpSink,
    home: Home,
    job_id: str,
    number: int,
    deadlines_s: Mapping[str, float],
) -> None:
    told = await client.spec()
    spec = JobSpec.from_json(told)
    sink.know([Path(path) for path in told["checkpoints"]])
    connect(os.environ.get("RAY_ADDRESS"))
    with marked(home.job(job_id), _models(spec)) as shared:
        await check_nodes(shared)
    files = await fetch_missing(client, spec.files, home.attempt(job_id, number) / "files")
    trackers = trackers_of(spec.config, home.results(job_id), job_id)
    journal = ResultJournal(
        home.results(job_id), sink, attempt=number, trackers=trackers, deadlines_s=deadlines_s
    )
    attempt = attempt_of(
        AttemptSpec(
            job_id=job_id,
            attempt=number,
            config=spec.config,
            files=files,
            model_path=spec.model_path,
            behavior_model_path=spec.behavior_model_path,
            judges=spec.judges,
            directory=home.job(job_id),
            cache=home.cache,
            endpoints=read_endpoints(home.endpoints),
            committed=spec.checkpoint,
        ),
        RayPlacement(spec.config.resources),
        journal,
    )
    with paths_as_written(spec.config):
        result = await attempt.run()
    await _conclude(sink, result)


def _models(spec: JobSpec) -> list[Path]:
    return [p for p in (spec.model_path, spec.behavior_model_path, *spec.judges.values()) if p is not None]


async def _conclude(sink: HttpSink, result: AttemptResult) -> None:
    """Tell the service how it ended; files are complete on disk by now."""
    ended = result.outcome.ended
    if ended == "run":
        await sink.running()  # an attempt that resumed behind the last step has not said so yet
        await sink.transition(
            "succeeded",
            results={
                # A best-of-N job trains nothing and has files alone.
                "fine_tuned_model_path": None if result.model_path is None else str(result.model_path),
                "result_files": [str(path) for path in result.result_files],
                "trained_tokens": result.outcome.state.trained_tokens,
                "hyperparameters": dict(result.picked),
            },
        )
    else:
        await sink.transition("cancelled" if ended == "cancel" else "paused")


def _wire_error(error: ModeseekError) -> dict[str, str | None]:
    return {"code": error.code, "message": str(error), "param": error.param}


def _named(error: Exception) -> ModeseekError:
    """An error of the driver's own, or of Ray's, in our words."""
    if is_full(error):
        return StorageError(
            f"the driver cannot write: {error}.",
            mend="Free some space, then resume the job: it goes on from its last checkpoint.",
            code="disk_full",
        )
    if is_out_of_memory(error):
        return out_of_memory("the driver failed", error)
    return ModeseekError(
        f"the driver failed: {error!r}.",
        mend="The traceback is in the attempt's log (`modeseek logs JOB`); please report it.",
    )
