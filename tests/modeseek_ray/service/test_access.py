"""Who is let in, and what the internal routes believe."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import typer

from actors.commands import keys as keys_command
from actors.fetching import fetch_missing
from modeseek_ray.client import AttemptClient
from modeseek_ray.errors import ServiceError
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.context import is_loopback
from modeseek_ray.service.serve import announce, check_exposure, only_service

ROWS = b'{"prompt": "one plus one is", "completion": " two"}\n' * 3
USER_ROUTES = [
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/{file}"),
    ("GET", "/v1/files/{file}/content"),
    ("DELETE", "/v1/files/{file}"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs/validate"),
    ("POST", "/v1/fine_tuning/alpha/graders/run"),
    ("POST", "/v1/fine_tuning/alpha/graders/validate"),
    ("GET", "/v1/fine_tuning/validations"),
    ("GET", "/v1/fine_tuning/validations/{check}"),
    ("GET", "/v1/fine_tuning/validations/{check}/report"),
    ("GET", "/v1/fine_tuning/jobs/{job}"),
    ("POST", "/v1/fine_tuning/jobs/{job}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{job}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints"),
    ("GET", "/v1/fine_tuning/jobs/{job}/weights"),
    ("GET", "/v1/fine_tuning/jobs/{job}/report"),
    ("GET", "/v1/fine_tuning/jobs/{job}/logs"),
    ("GET", "/v1/webhook_endpoints"),
    ("POST", "/v1/webhook_endpoints"),
    ("GET", "/v1/webhook_endpoints/{hook}"),
    ("POST", "/v1/webhook_endpoints/{hook}"),
    ("DELETE", "/v1/webhook_endpoints/{hook}"),
    ("POST", "/v1/webhook_endpoints/{hook}/rotate_secret"),
    ("POST", "/v1/webhook_endpoints/{hook}/test"),
    ("GET", "/v1/webhook_event_types"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
    ("DELETE", "/v1/models/x"),
]


def test_a_driver_fetches_the_files_of_its_job_and_no_others(service: Any, tmp_path: Path) -> None:
    """For a node that does not see the path under which a file was registered."""
    job_id = service.submit()

    async def talk() -> None:
        driver = service.driver(job_id)
        here = tmp_path / "there"
        here.write_text("seen already")
        files = {"training_file": tmp_path / "elsewhere.jsonl", "validation_file": here}
        found = await fetch_missing(driver, files, tmp_path / "files")
        assert found["validation_file"] == here
        assert found["training_file"].read_bytes() == ROWS
        assert found["training_file"].suffix == ".jsonl"
        with pytest.raises(ServiceError, match="has no replay_file"):
            await driver.fetch("replay_file", tmp_path / "none")
        assert not (tmp_path / "none").exists()
        stranger = AttemptClient(service.url, job_id, 1, token="guessed", fence=1)
        with pytest.raises(ServiceError) as caught:
            await stranger.fetch("training_file", tmp_path / "none")
        assert caught.value.http_status in (401, 403)
        await driver.close()
        await stranger.close()

    asyncio.run(talk())


def test_the_list_of_routes_is_complete(service: Any) -> None:
    with service.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    described = {
        (method.upper(), path) for path, item in paths.items() for method in item if path.startswith("/v1")
    }
    names = {
        "{file}": "{file_id}",
        "{job}": "{job_id}",
        "{check}": "{validation_id}",
        "{hook}": "{endpoint_id}",
        "/models/x": "/models/{name}",
    }
    listed = set()
    for method, path in USER_ROUTES:
        for ours, theirs in names.items():
            path = path.replace(ours, theirs)
        listed.add((method, path))
    assert listed == described


def test_with_keys_every_route_needs_one(start_service: Any) -> None:
    service = start_service()
    file_id, job_id = service.upload(), service.submit()
    key, record = service.store.keys.create("mine")
    other, _ = service.store.keys.create("theirs", tenant_id="other")
    hook = service.store.webhooks.create("default", "mine", "https://x.org", ["fine_tuning.job.failed"]).id
    with service.http() as http:
        for method, template in USER_ROUTES:
            path = template.format(file=file_id, job=job_id, check="check-1", hook=hook)
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {key}"}):
                answer = http.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
            if "{" in template:
                answer = http.request(method, path, headers={"Authorization": f"Bearer {other}"})
                assert answer.status_code == 404, path
    assert service.openai(key).fine_tuning.jobs.retrieve(job_id).organization_id == "default"
    assert service.openai(other).fine_tuning.jobs.list().data == []
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, organization="other").models.list()
    service.store.keys.revoke(record.id)
    with pytest.raises(openai.AuthenticationError):
        service.openai(key).models.list()


def test_after_the_last_key_nobody_is_let_in(start_service: Any) -> None:
    service = start_service()

    def asked(*headers: dict[str, str]) -> list[int]:
        with service.http() as http:
            return [http.get("/v1/models", headers=header).status_code for header in headers]

    key, record = service.store.keys.create("mine")
    bearer = {"Authorization": f"Bearer {key}"}
    assert asked({}, bearer) == [401, 200]
    service.store.keys.revoke(record.id)
    assert asked({}, bearer) == [401, 401]
    service.store.keys.remove_all()
    assert asked({}) == [200]


def test_keys_change_while_the_service_runs(
    start_service: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command asks the service, which alone writes: it opens no store of its own."""
    service = start_service()
    monkeypatch.setattr(keys_command, "Store", None)
    with only_service(service.home):
        with pytest.raises(ServiceError, match="no service that answers"):
            keys_command.create(service.home, "too early")
        announce(service.app, "0.0.0.0", int(service.url.rsplit(":", 1)[1]))
        assert service.home.operator.stat().st_mode & 0o777 == 0o600

        keys_command.create(service.home, "alice", "team", read_only=True)
        key = capsys.readouterr().out.strip()
        record = service.store.keys.verify(key)
        assert (record.name, record.tenant_id, record.scopes) == ("alice", "team", ["read"])
        keys_command.list_keys(service.home)
        assert record.id in capsys.readouterr().out
        service.openai(key).models.list()

        keys_command.revoke(service.home, record.id)
        assert "nobody is answered" in capsys.readouterr().err
        with pytest.raises(openai.AuthenticationError):
            service.openai(key).models.list()
        with pytest.raises(ServiceError) as caught:
            keys_command.revoke(service.home, "none")
        assert caught.value.code == "key_not_found"

        monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
        with pytest.raises(typer.Abort):
            keys_command.remove_all(service.home, confirmed=False)
        assert service.store.keys.required()
        keys_command.remove_all(service.home, confirmed=True)
        assert "NO KEY IS NEEDED" in capsys.readouterr().err
        assert not service.store.keys.required()
    assert not service.home.operator.exists()


def test_the_operators_routes_want_the_homes_secret(start_service: Any) -> None:
    service = start_service()
    key, _ = service.store.keys.create("mine")
    announce(service.app, "127.0.0.1", 1)
    token = json.loads(service.home.operator.read_text())["token"]
    with service.http() as http:
        for given in ("", "Bearer", f"Bearer {key}", f"Basic {token}", f"Bearer {token}x", "Bearer \xe9"):
            headers = {"Authorization": given.encode("latin-1")}
            assert http.get("/internal/operator/keys", headers=headers).status_code == 401, given
            assert http.delete("/internal/operator/keys", headers=headers).status_code == 401, given
        good = {"Authorization": f"Bearer {token}"}
        assert [found["name"] for found in http.get("/internal/operator/keys", headers=good).json()] == [
            "mine"
        ]
        answer = http.post("/internal/operator/keys", headers=good, json={"name": "x", "scopes": ["root"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_config")


def test_a_key_that_may_only_look_changes_nothing(start_service: Any) -> None:
    service = start_service()
    job_id = service.submit()
    key, _ = service.store.keys.create("looks", scopes=("read",))
    client = service.openai(key)
    assert client.fine_tuning.jobs.retrieve(job_id).id == job_id
    with pytest.raises(openai.PermissionDeniedError) as refused:
        client.fine_tuning.jobs.cancel(job_id)
    assert refused.value.code == "scope_missing"


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Host": "evil.example:8420"}]
)
def test_without_keys_foreign_pages_are_not_answered(service: Any, headers: dict[str, str]) -> None:
    with service.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 401
        assert http.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_only_loopback_without_keys(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 's.sqlite3'}")
    check_exposure(store, "127.0.0.1")
    check_exposure(store, "::1")
    with pytest.raises(ServiceError, match="without API keys"):
        check_exposure(store, "0.0.0.0")
    store.keys.create("mine")
    check_exposure(store, "0.0.0.0")
    store.close()


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "localhost.evil", "", None, "127.0.0.1.evil")))


def refused(call: Any) -> tuple[int, str]:
    with pytest.raises(ServiceError) as caught:
        asyncio.run(call)
    return caught.value.http_status, caught.value.code


def test_drivers_are_believed_for_their_own_attempt_only(service: Any) -> None:
    job_id = service.submit()
    service.driver(job_id)
    secret = service.launcher.secrets[job_id]

    def driver(**changes: Any) -> AttemptClient:
        said = {"job_id": job_id, "attempt": 1, "token": secret["token"], "fence": secret["fence"], **changes}
        return AttemptClient(service.url, **said)

    assert refused(driver(token="guess").heartbeat({})) == (401, "invalid_api_key")
    assert refused(driver(fence=0).heartbeat({})) == (403, "stale_fence")
    # Whoever has no token is told one thing, whatever there is: by every route, before anything is looked up.
    results = {"fine_tuned_model_path": "/etc"}
    calls: list[Callable[[AttemptClient], Any]] = [
        lambda stranger: stranger.heartbeat({}),
        lambda stranger: stranger.spec(),
        lambda stranger: stranger.events([]),
        lambda stranger: stranger.checkpoint(1, "/etc", {}),
        lambda stranger: stranger.prune("/etc"),
        lambda stranger: stranger.transition("succeeded", results=results),
        lambda stranger: stranger.transition("recovering"),
    ]
    for wrong in ({"token": "guess"}, {"attempt": 2}, {"job_id": "ftjob-none"}):
        for call in calls:
            assert refused(call(driver(**wrong))) == (401, "invalid_api_key")
    assert refused(driver().transition("queued")) == (400, "illegal_transition")
    assert refused(driver().transition("succeeded")) == (400, "illegal_transition")  # it never ran
    assert refused(driver().checkpoint(1, "/etc", {})) == (400, "invalid_request")
    assert refused(driver().transition("running", results={"result_files": ["/etc/passwd"]}))[0] == 400
    assert asyncio.run(driver().heartbeat({"step": 1})) == "run"
    asyncio.run(driver().transition("recovering", error={"code": "no_resources", "message": "no room."}))
    assert refused(driver().heartbeat({})) == (403, "stale_fence")
    assert service.store.jobs.get(job_id).fruitless_attempts == 0
    with service.client() as client:
        client.cancel(job_id)
        client.wait(job_id, timeout_s=10, poll_s=0.05)
    assert refused(driver().heartbeat({})) == (403, "stale_fence")


def test_an_api_key_is_not_an_attempt_token(start_service: Any) -> None:
    service = start_service()
    job_id = service.submit()
    service.driver(job_id)
    key, _ = service.store.keys.create("mine")
    client = AttemptClient(service.url, job_id, 1, token=key, fence=1)
    assert refused(client.spec()) == (401, "invalid_api_key")
    with service.http(
        headers={"Authorization": f"Bearer {service.launcher.secrets[job_id]['token']}"}
    ) as http:
        assert http.get("/v1/models").status_code == 401
