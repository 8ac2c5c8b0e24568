"""The same service on PostgreSQL: a second one on the same store, and what only PostgreSQL minds."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest


@pytest.fixture
def pair(start_service: Any, postgres: Any) -> Any:
    """Two services, each with its reconciler, on one store and one home."""
    url = postgres()
    return start_service(store_url=url), start_service(store_url=url)


def test_two_services_make_one_job_per_key_start_it_once_and_stream_each_others_events(pair: Any) -> None:
    body = pair[0].body()
    keys = [f"key-{i % 6}" for i in range(24)]

    def send(i: int) -> tuple[str, str]:
        with pair[i % 2].client() as client:
            return keys[i], client.submit(body, idempotency_key=keys[i])["id"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(24)))
    ids = dict(answers)
    assert len(set(ids.values())) == 6
    assert all(ids[key] == job_id for key, job_id in answers)

    streamed: list[str] = []
    with ExitStack() as stack:
        first, second = (stack.enter_context(service.client()) for service in pair)
        watched = ids["key-0"]
        follower = threading.Thread(target=lambda: streamed.extend(e["id"] for e in second.stream(watched)))
        follower.start()
        for job_id in ids.values():
            first.cancel(job_id)
        for job_id in ids.values():
            assert first.wait(job_id, timeout_s=30, poll_s=0.05)["status"] == "cancelled"
        follower.join(timeout=60)
        assert not follower.is_alive()
        assert streamed == [event["id"] for event in first.events(watched)]
    launched = [set(service.launcher.statuses) for service in pair]
    assert not launched[0] & launched[1]  # no attempt was started by both


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/fine_tuning/jobs?after=%00", "/v1/models/a%00b"])
def test_a_nul_character_in_a_url_is_a_mistake_of_the_caller(service: Any, path: str) -> None:
    """PostgreSQL cannot even compare with such a text."""
    with service.http() as http:
        answer = http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert answer.headers["x-request-id"]
