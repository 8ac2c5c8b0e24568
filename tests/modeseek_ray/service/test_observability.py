"""What operators see: figures for Prometheus, logs that say what they are about, a driver's own log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.journal import CallbackSink, ResultJournal
from modeseek_ray.jobs.structured_logs import JsonLines, PlainLines, _note, about
from modeseek_ray.types import Evidence, Group, Handle, StepReport
from modeseek_ray.weights import Weighting, weigh


def figures(service: Any) -> dict[str, float]:
    """Sample name with its labels -> value."""
    with service.http() as http:
        text = http.get("/metrics").text
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def metrics_event(results: Path) -> dict[str, Any]:
    """What a driver's journal says of a step that followed a sync of 0.7 s."""
    events: list[Any] = []
    journal = ResultJournal(results, CallbackSink(events.append))
    seconds = {"score": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.05, "total": 1.0}
    figures = {"sync.seconds": 0.7}  # as `Driver._sync` names it
    report = StepReport(
        step=0, loss=1.0, nll=1.0, accuracy=0.5, grad_norm=1.0, learning_rate=1e-5, num_tokens=500,
        seconds=seconds, figures=figures,
    )  # fmt: skip
    rows_N = np.arange(2)
    group = Group(0, rows_N, num_tokens_N=rows_N + 250, length_N=rows_N + 250, payload=Handle([], rows_N))
    weights = weigh(Evidence.of([group]), Weighting())
    await journal.record(1, [group], replace(weights, ess_ratio=0.45), report, 2)
    journal.close()
    return dict(next(event for event in events if event["type"] == "metrics"))


def test_a_drivers_steps_become_figures(start_service: Any, tmp_path: Path) -> None:
    service = start_service()
    job_id = service.submit()
    driver = service.driver(job_id)

    written = asyncio.run(metrics_event(tmp_path))

    def step(seq: int, **data: Any) -> dict[str, Any]:
        return {**written, "seq": seq, "created_at": time.time() - 3, "data": {**written["data"], **data}}

    async def report() -> None:
        await driver.heartbeat({"step": 2, "tokens_per_s": 250.0})
        await driver.transition("running")
        await driver.events([step(1), step(2, ess_ratio=float("nan"), num_tokens=-1)])
        await driver.events([step(2)])  # sent again: stored already
        await driver.close()

    asyncio.run(report())
    seen = figures(service)
    assert seen["modeseek_jobs|running"] == 1
    assert seen["modeseek_tokens_per_second"] == 250
    assert seen["modeseek_steps_total"] == 2
    assert seen["modeseek_trained_tokens_total"] == 500
    assert (seen["modeseek_ess_ratio_count"], seen["modeseek_ess_ratio_sum"]) == (1, 0.45)
    parts = {"score": 0.2, "forward": 0.4, "backward": 0.6, "optimizer": 0.1, "sync": 1.4, "total": 2.0}
    assert {part: seen[f"modeseek_step_part_seconds_sum|{part}"] for part in parts} == pytest.approx(parts)
    assert 3 <= seen["modeseek_event_lag_seconds_sum"] / seen["modeseek_event_lag_seconds_count"] < 10


def test_the_queue_and_the_outbox_are_measured(start_service: Any) -> None:
    service = start_service()
    for job_id in [service.submit() for _ in range(6)][:4]:
        service.driver(job_id)
    service.store.webhooks.create("default", "x", "https://203.0.113.1/", ["fine_tuning.job.cancelled"])
    seen = figures(service)
    assert (seen["modeseek_queue_length"], seen["modeseek_webhooks_waiting"]) == (2, 0)
    assert 0 <= seen["modeseek_queue_oldest_seconds"] < 60
    last = service.store.jobs.in_states("queued")[-1]
    with service.client() as client:
        client.cancel(last.id)
    seen = figures(service)
    assert (seen["modeseek_queue_length"], seen["modeseek_webhooks_waiting"]) == (1, 1)


def test_the_drivers_log_is_its_owners_to_read(start_service: Any) -> None:
    service = start_service()
    job_id = service.submit()
    service.driver(job_id)
    with service.client() as client:
        assert client.logs(job_id) == f"what {job_id}-1 printed\n"
    with service.http() as http:
        answer = http.get(f"/v1/fine_tuning/jobs/{job_id}/logs?attempt=2")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "log_not_found")


def test_a_line_says_which_job_attempt_and_request_it_is_about() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    handler.addFilter(_note)
    log = logging.getLogger("test_observability")
    log.addHandler(handler)
    log.propagate = False

    async def inner() -> None:
        log.warning("it %s", "happened")

    async def outer() -> None:
        with about(job="ftjob-1", attempt=2):
            await asyncio.create_task(inner())  # also in the tasks it starts
        log.warning("elsewhere")

    asyncio.run(outer())
    handler.setFormatter(PlainLines("%(levelname)s %(facts)s%(message)s"))
    with about(request="req_1"):
        try:
            raise ValueError("bad\nline")
        except ValueError:
            log.exception("plain")
            handler.setFormatter(JsonLines())
            log.exception("told")
    lines = stream.getvalue().splitlines()
    first, second, last = json.loads(lines[0]), json.loads(lines[1]), json.loads(lines[-1])
    assert (first["job"], first["attempt"], first["message"]) == ("ftjob-1", 2, "it happened")
    assert "job" not in second
    assert lines[2] == "ERROR [request=req_1] plain"
    assert last["request"] == "req_1" and "bad\nline" in last["traceback"]
