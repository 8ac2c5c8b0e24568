"""How much one tenant may take: requests, files, bytes, and what the cluster can never give."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from modeseek_ray.jobs.launcher import Capacity
from modeseek_ray.service.limits import LimitError, Limits

ROW = b'{"prompt": "a", "completion": "b"}\n'


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_of_sixty_a_minute_fills_with_one_a_second() -> None:
    clock = Clock()
    limits = Limits(lambda _: 60, max_open=100, clock=clock)
    for _ in range(60):
        limits.enter("x")()
    with pytest.raises(LimitError) as refused:
        limits.enter("x")
    assert (refused.value.code, refused.value.retry_after_s) == ("rate_limited", 1.0)
    limits.enter("y")()  # another tenant's bucket is its own
    clock.now += 2.0
    limits.enter("x")()
    limits.enter("x")()
    with pytest.raises(LimitError):
        limits.enter("x")


def test_open_requests_are_counted_until_they_end() -> None:
    limits = Limits(lambda _: None, max_open=2)
    first, _ = limits.enter("x"), limits.enter("x")
    with pytest.raises(LimitError) as refused:
        limits.enter("x")
    assert refused.value.code == "too_many_open_requests"
    first()
    limits.enter("x")


def test_too_many_requests_are_429_with_a_time_to_come_back(start_service: Any) -> None:
    service = start_service(requests_per_minute=5)
    with service.http() as http:
        began_s = time.monotonic()
        answers = [http.get("/v1/models") for _ in range(6)]
        took_s = time.monotonic() - began_s
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert answers[-1].json()["error"]["code"] == "rate_limited"
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"
        assert 12 - took_s <= int(answers[-1].headers["retry-after"]) <= 12
        assert http.get("/healthz").status_code == 200  # operators are not counted
    with pytest.raises(openai.RateLimitError):
        service.openai().models.list()


def test_a_stream_is_an_open_request_until_its_client_goes(start_service: Any, until: Any) -> None:
    service = start_service(max_open_requests=1)
    job_id = service.submit()
    service.driver(job_id)
    path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with service.http() as http, service.http() as other:
        with http.stream("GET", path) as stream:
            assert stream.status_code == 200
            assert other.get("/v1/models").status_code == 429
        until(lambda: other.get("/v1/models").status_code == 200)


def test_a_quota_ends_an_upload_while_it_comes_in(start_service: Any) -> None:
    """The body claims no length; after the quota's bytes the service answers, and keeps nothing."""
    service = start_service()
    service.store.tenants.change("default", max_bytes=2**20)
    sent = 0

    def endless() -> Any:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
        while sent < 256 * 2**20:
            sent += len(ROW) * 1000
            yield ROW * 1000

    with service.http() as http:
        try:
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            answer = http.post("/v1/files", content=endless(), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "quota_exceeded")
        except httpx.TransportError:
            pass  # the service closed while we were sending: as it should
    assert sent < 128 * 2**20
    assert list(service.home.files.iterdir()) == []


def test_files_are_counted_and_deleting_makes_room(start_service: Any) -> None:
    service = start_service()
    client = service.openai()
    kept = [client.files.create(file=("a.jsonl", ROW), purpose="fine-tune").id for _ in range(2)]
    service.store.tenants.change("default", max_files=2)
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("b.jsonl", ROW), purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (413, "quota_exceeded")
    client.files.delete(kept[0])
    client.files.create(file=("b.jsonl", ROW), purpose="fine-tune")


def test_two_uploads_at_once_do_not_pass_the_quota_together(start_service: Any) -> None:
    service = start_service()
    service.store.tenants.change("default", max_bytes=300_000)
    content = ROW * 6000  # 210,000 bytes each
    codes: list[int] = []

    def send() -> None:
        with service.http() as http:
            form = {"files": {"file": ("x", content)}, "data": {"purpose": "fine-tune"}}
            codes.append(http.post("/v1/files", **form).status_code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 413, 413, 413]


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"trainers": 5}, "needs 5 CPUs at a time, the whole cluster has 4"),
        ({"trainers": 2, "gpus_per_worker": 1.0}, "needs 2 GPUs at a time, the whole cluster has 1"),
        ({"cpus_per_worker": 3.0}, "needs 3 CPUs and 0 GPUs on one node; the largest has 2 and 1"),
    ],
)
def test_a_job_that_can_never_fit_is_refused_with_what_it_needs(
    service: Any, monkeypatch: pytest.MonkeyPatch, resources: Any, said: str
) -> None:
    service.launcher.has = Capacity(cpus=4, gpus=1, node_cpus=2, node_gpus=1)
    monkeypatch.setattr(service.reconciler, "_capacity_until", 0.0)
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        service.openai().fine_tuning.jobs.create(**service.body(), extra_body={"resources": resources})
    assert (refused.value.code, refused.value.param) == ("does_not_fit", "resources")


def test_a_job_that_no_longer_fits_stands_aside_and_keeps_nobody_waiting(
    start_service: Any, until: Any
) -> None:
    """Accepted while nobody knew the cluster; it starts when that has grown, and says until then what it needs."""
    service = start_service()
    large = service.submit(resources={"trainers": 3})
    driver = service.driver(large)
    service.launcher.has = Capacity(cpus=2, gpus=0, node_cpus=2, node_gpus=0)
    service.reconciler._capacity_until = 0.0

    async def wait_in_vain() -> None:
        await driver.transition("recovering", error={"code": "no_resources", "message": "no room."})
        await driver.close()

    asyncio.run(wait_in_vain())
    del service.launcher.secrets[large]  # of its first attempt
    service.driver(service.submit())
    with service.client() as client:
        assert client.job(large)["status"] == "queued"
        until(lambda: any("stands aside" in event["message"] for event in client.events(large)))
        [said] = [event for event in client.events(large) if "stands aside" in event["message"]]
        assert (
            said["level"] == "warn" and "needs 3 CPUs at a time, the whole cluster has 2" in said["message"]
        )
        service.launcher.has = Capacity(cpus=4, gpus=0, node_cpus=4, node_gpus=0)
        service.reconciler._capacity_until = 0.0
        service.driver(large)


def test_a_queued_job_says_its_place_and_when_it_may_start(start_service: Any) -> None:
    service = start_service()
    ids = [service.submit() for _ in range(5)]  # four may run at a time
    for job_id in ids[:4]:
        service.driver(job_id)
    with service.client() as client:
        job = client.job(ids[4])
        assert (job["status"], job["queue_position"]) == ("queued", 1)
        assert 500 < job["estimated_start"] - job["created_at"] < 700  # ten minutes, as nothing is known
        assert client.job(ids[0])["queue_position"] is None
