"""Server-sent events: all of them, once, in order, across cut connections and a killed service."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest

from modeseek_ray.client import Client
from modeseek_ray.jobs.records import EventDraft


def read_stream(service: Any, job_id: str, count: int | None = None, **headers: str) -> list[dict[str, Any]]:
    """Events until [DONE], or the first `count`, each with the SSE id it came under."""
    found: list[dict[str, Any]] = []
    url = f"/v1/fine_tuning/jobs/{job_id}/events"
    data: dict[str, Any] = {}
    with (
        service.http() as http,
        http.stream("GET", url, params={"stream": "true"}, headers=headers) as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line == "data: [DONE]":
                return found
            if line.startswith("data: "):
                data = json.loads(line[6:])
            elif line.startswith("id: "):
                assert line[4:] == data["id"]
                found.append(data)
                if len(found) == count:
                    return found
    raise AssertionError("the stream ended without [DONE]")


def finish(service: Any, job_id: str) -> None:
    with service.client() as client:
        client.cancel(job_id)
        client.wait(job_id, timeout_s=10, poll_s=0.05)


def test_a_stream_shows_what_happens_as_it_happens_and_ends_with_the_job(service: Any) -> None:
    job_id = service.submit()
    seen: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: seen.extend(read_stream(service, job_id)))
    reader.start()
    driver = service.driver(job_id)

    async def drive() -> None:
        await driver.transition("running")
        for i in range(1, 51):
            await driver.events(
                [{"seq": i, "type": "metrics", "message": f"m{i}", "data": {"line": "a\u2028b"}}]
            )
        await driver.transition("failed", error={"code": "numerics", "message": "loss is NaN"})
        await driver.close()

    asyncio.run(drive())
    reader.join(timeout=60)
    assert not reader.is_alive()
    stored = [event.id for event in service.store.events.after(job_id, 0)]
    assert [event["id"] for event in seen] == stored
    assert [event["message"] for event in seen if event["type"] == "metrics"] == [
        f"m{i}" for i in range(1, 51)
    ]
    assert seen[-1]["message"] == "The job failed. loss is NaN"


def test_last_event_id_resumes_behind_it(service: Any) -> None:
    job_id = service.submit()
    service.driver(job_id)
    finish(service, job_id)
    everything = [event["id"] for event in read_stream(service, job_id)]
    assert len(everything) >= 5
    for cut in range(len(everything)):
        rest = read_stream(service, job_id, **{"Last-Event-ID": everything[cut]})
        assert [event["id"] for event in rest] == everything[cut + 1 :]


def test_an_event_id_of_another_job_is_refused(service: Any) -> None:
    job_id = service.submit()
    with service.http() as http:
        answer = http.get(
            f"/v1/fine_tuning/jobs/{job_id}/events",
            params={"stream": "true"},
            headers={"Last-Event-ID": "17"},
        )
    assert answer.status_code == 400
    finish(service, job_id)


def test_the_accept_header_asks_for_a_stream_too(service: Any) -> None:
    job_id = service.submit()
    with (
        service.http() as http,
        http.stream(
            "GET", f"/v1/fine_tuning/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}
        ) as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
    finish(service, job_id)


def test_a_silent_stream_shows_signs_of_life(start_service: Any) -> None:
    service = start_service(sse_keepalive_s=0.1)
    job_id = service.submit()
    service.driver(job_id)
    with service.http() as http, http.stream(
        "GET", f"/v1/fine_tuning/jobs/{job_id}/events", params={"stream": "true"}
    ) as stream:  # fmt: skip
        comments = (line for line in stream.iter_lines() if line.startswith(":"))
        assert next(comments) and next(comments)


def test_listeners_that_leave_are_forgotten(service: Any, until: Any) -> None:
    job_id = service.submit()
    notifier_figure = "modeseek_event_streams 0.0"
    read_stream(service, job_id, count=1)
    service.store.events.add(job_id, EventDraft("something to send"))

    def gone() -> bool:
        with service.http() as http:
            return notifier_figure in http.get("/metrics").text

    until(gone)
    finish(service, job_id)


@pytest.mark.parametrize("every", [1, 3])
def test_our_client_survives_connections_that_break(service: Any, every: int) -> None:
    """A transport that cuts each stream after a few events: nothing is missing and nothing comes twice."""
    job_id = service.submit()
    service.driver(job_id)
    for i in range(10):
        service.store.events.add(job_id, EventDraft(f"e{i}"))
    finish(service, job_id)
    stored = [event.id for event in service.store.events.after(job_id, 0)]
    with Client(service.url) as client:
        client._http = httpx.Client(base_url=service.url, transport=Cutting(every), trust_env=False)
        assert [event["id"] for event in client.stream(job_id)] == stored


class Cutting(httpx.HTTPTransport):
    """Ends every streamed answer in the middle of event number `every` + 1."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every = every

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        body = response.stream
        every = self._every

        class Cut(httpx.SyncByteStream):
            def __iter__(self) -> Any:
                text = b""
                for chunk in body:  # type: ignore[union-attr]
                    text += chunk
                    events = text.split(b"\n\n")
                    if len(events) > every + 2 and not text.endswith(b"[DONE]\n\n"):
                        yield b"\n\n".join(events[: every + 1]) + b"\n\n" + events[every + 1][:10]
                        raise httpx.ReadError("cut", request=request)
                yield text

            def close(self) -> None:
                response.close() if response.stream is not self else body.close()  # type: ignore[union-attr]

        return httpx.Response(response.status_code, headers=response.headers, stream=Cut())


def test_events_are_pushed_not_polled(service: Any) -> None:
    """Each event is read from the open stream before the next is written; polling would take 15 s for each of 20."""
    job_id = service.submit()
    service.driver(job_id)
    url = f"/v1/fine_tuning/jobs/{job_id}/events"
    with service.http() as http, http.stream("GET", url, params={"stream": "true"}) as stream:
        messages = (
            json.loads(line[6:])["message"] for line in stream.iter_lines() if line.startswith("data: ")
        )
        started = time.monotonic()
        for i in range(20):
            service.store.events.add(job_id, EventDraft(f"pushed {i}"))
            while next(messages) != f"pushed {i}":
                pass  # what was there before
        assert time.monotonic() - started < 150
    finish(service, job_id)
