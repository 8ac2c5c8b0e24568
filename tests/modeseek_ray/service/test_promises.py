"""An answered submission is never lost and never doubled, whatever happens to the process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from modeseek_ray.client import Client
from modeseek_ray.errors import ServiceError, StorageError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.service.serve import listen, only_service


@contextlib.contextmanager
def service_process(home: Path, root: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "modeseek_ray.service", "--home", str(home), "--port", str(port)]
    process = subprocess.Popen([*command, "--root", str(root)])
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 60
            while not client.is_ready():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def test_kill_9_after_the_answer_loses_nothing(
    tmp_path: Path, free_port: Callable[[], int], make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "models" / "base")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    home, port = tmp_path / "home", free_port()
    answered: dict[str, str] = {}
    streamed: list[str] = []
    with service_process(home, tmp_path, port) as process, Client(f"http://127.0.0.1:{port}") as client:
        file_id = client.upload(data)["id"]
        body = {"model": str(model), "training_file": file_id}
        for i in range(5):
            answered[f"key-{i}"] = client.submit(body, idempotency_key=f"key-{i}")["id"]
        follower = threading.Thread(
            target=lambda: streamed.extend(e["id"] for e in client_stream(port, answered["key-0"]))
        )
        follower.start()
        time.sleep(0.5)
        process.kill()
        process.wait()
        # Sent into the gap: the client tries again until the next process answers, with the same key.
        late = ThreadPoolExecutor(1).submit(client.submit, body, idempotency_key="key-late", patience_s=120)
        with service_process(home, tmp_path, port):
            assert late.result(timeout=120)["id"] not in answered.values()
            assert client.content(file_id) == data.read_bytes()
            for key, job_id in answered.items():
                assert client.job(job_id)["status"] == "validating_files"
                assert client.submit(body, idempotency_key=key)["id"] == job_id
                assert Home(home).config(job_id).is_file()
            assert len(client.jobs(limit=100)) == 6
            client.cancel(answered["key-0"])
            follower.join(timeout=60)
            assert not follower.is_alive()
            assert streamed == [event["id"] for event in client.events(answered["key-0"])]


def client_stream(port: int, job_id: str) -> Iterator[Any]:
    with Client(f"http://127.0.0.1:{port}") as client:
        yield from client.stream(job_id)


def test_many_submitters_with_repeats_make_one_job_per_key(service: Any) -> None:
    body = service.body()
    keys = [f"load-{i % 12}" for i in range(24)]

    def send(key: str) -> tuple[str, str, int]:
        with service.http() as http:
            while True:
                answer = http.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": key})
                if answer.status_code != 409:
                    return key, answer.json().get("id"), answer.status_code
                assert answer.json()["error"]["code"] == "idempotency_key_in_flight"
                assert (answer.headers["retry-after"], "x-should-retry" in answer.headers) == ("1", False)
                time.sleep(0.05)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, keys))
    assert {status for _, _, status in answers} == {200}
    by_key = {key: job_id for key, job_id, _ in answers}
    assert all(by_key[key] == job_id for key, job_id, _ in answers)
    assert len(set(by_key.values())) == 12
    directories = {path.name for path in service.home.jobs.iterdir()}
    assert directories == {job.id for job in service.store.jobs.page(limit=100).data}
    with service.client() as client:
        for job_id in by_key.values():
            client.cancel(job_id)


def test_a_key_with_another_body_is_refused(service: Any) -> None:
    body = service.body()
    with service.client() as client:
        job = client.submit(body, idempotency_key="reused")
        with pytest.raises(ServiceError) as caught:
            client.submit({**body, "seed": 5}, idempotency_key="reused")
        assert (caught.value.http_status, caught.value.code) == (400, "idempotency_key_reused")
        assert "new key" in caught.value.mend
        client.cancel(job["id"])


def test_a_key_in_flight_is_409_and_then_answers_with_the_one_job(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeseek_ray.service import jobs

    body, headers = service.body(), {"Idempotency-Key": "slow"}
    entered, release = threading.Event(), threading.Event()
    check = jobs.check

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert release.wait(60)
        return check(*arguments)

    monkeypatch.setattr(jobs, "check", slow)
    with ThreadPoolExecutor(1) as pool, service.http() as http:
        first = pool.submit(http.post, "/v1/fine_tuning/jobs", json=body, headers=headers)
        assert entered.wait(60)
        with service.http() as other:
            second = other.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        assert (second.status_code, second.json()["error"]["code"]) == (409, "idempotency_key_in_flight")
        release.set()
        made = first.result().json()
        again = http.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        assert (again.status_code, again.json()["id"]) == (200, made["id"])
        http.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")


def test_a_full_disk_answers_503_and_changes_nothing(start_service: Any) -> None:
    """SQLite may not add a page, which is what it is told by a full disk, too."""
    service = start_service()
    large = service.body(metadata={f"key-{i}": "x" * 512 for i in range(16)})
    limit_pages(service, 1)
    with service.http() as http:
        answer = http.post("/v1/fine_tuning/jobs", json=large, headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"]
        assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        assert list(service.home.jobs.iterdir()) == []
        limit_pages(service, 1_000_000)
        answer = http.post("/v1/fine_tuning/jobs", json=large, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 200
    assert [path.name for path in service.home.jobs.iterdir()] == [answer.json()["id"]]


def limit_pages(service: Any, number: int) -> None:
    """A limit below the present size means the present size."""
    with service.store.database.write() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {number}")


def test_one_service_per_home(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with only_service(home), pytest.raises(StorageError, match="another service"), only_service(home):
        pass


def test_a_taken_port_is_said_in_words(free_port: Callable[[], int]) -> None:
    port = free_port()
    with listen("127.0.0.1", port) as first:
        first.listen()
        with pytest.raises(ServiceError, match="cannot listen") as caught, listen("127.0.0.1", port):
            pass
        assert caught.value.code == "port_taken"


def test_no_answer_is_said_in_words(free_port: Callable[[], int]) -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.is_ready()
        with pytest.raises(ServiceError, match="modeseek serve") as caught:
            client.jobs()
    assert caught.value.code == "unreachable"


def test_pages_for_operators(service: Any) -> None:
    with service.http() as http:
        job_id = service.submit()
        assert http.get("/healthz").json()["status"] == "ok"
        assert http.get("/readyz").json() == {"status": "ok", "runs_jobs": True}
        assert "openapi.json" in http.get("/docs").text
        assert http.get("/redoc").status_code == 404
        figures = http.get("/metrics").text
        assert 'modeseek_jobs{state="succeeded"}' in figures
        assert 'modeseek_request_seconds_count{method="GET",route="/healthz",status="200"} 1.0' in figures
        with service.client() as client:
            client.cancel(job_id)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("PUT", "/v1/files", 405, "method_not_allowed"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-none", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-none/events", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs?limit=0", 422, "invalid_parameter"),
        ("GET", "/v1/fine_tuning/jobs?limit=x", 422, "invalid_parameter"),
        ("GET", "/v1/fine_tuning/jobs?after=ftjob-none", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs?metadata[%22]=x", 400, "invalid_request"),
        ("GET", "/v1/files/file-none/content", 404, "file_not_found"),
        ("GET", "/v1/files/..%2F..%2Fstore.sqlite3", 404, "unknown_url"),
        ("GET", "/v1/models/ft%3Aa%2Fb", 404, "model_not_found"),
        ("DELETE", "/v1/models/playground%2Fmoe", 400, "invalid_request"),
    ],
)
def test_every_refusal_has_openais_shape(
    service: Any, method: str, path: str, status: int, code: str
) -> None:
    with service.http() as http:
        answer = http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code", "mend"}
    assert answer.headers["x-request-id"].startswith("req_")


def test_an_unforeseen_error_is_a_500_with_an_id_and_without_a_traceback(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store.models, "all", lambda *_: 1 / 0)
    with service.http() as http:
        answer = http.get("/v1/models")
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "ZeroDivisionError" not in answer.text


def test_answers_come_after_the_commit(service: Any) -> None:
    """A second connection, opened the moment the answer is there, sees the job."""
    body = service.body()
    with httpx.Client(base_url=service.url, trust_env=False) as http:
        job_id = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        assert service.store.jobs.get(job_id).config == body
    with service.client() as client:
        client.cancel(job_id)
