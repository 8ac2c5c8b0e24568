"""A second tenant cannot see, guess, cancel or read anything of the first: over every route of the app.

To the second tenant the first one's ids are answered exactly as ids that nobody has. The routes come from
the application's own table: a new one without a line in `CASES` fails.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from fastapi.testclient import TestClient

from actors.network import free_port
from modeseek_ray.jobs.launcher import ValidationOutcome
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.tables import metadata
from modeseek_ray.service import create_app
from tests.modeseek_ray.service.conftest import Running, serving


@dataclass(frozen=True)
class Case:
    """How a route is asked in the name of the second tenant, with the first one's ids in braces."""

    kind: Literal["hidden", "own", "open", "driver"]
    """`hidden`: it names a thing. `own`: it shows or makes the caller's own. `open`: it needs no key.
    `driver`: users' keys are refused, where drivers, engines and the operator ask."""
    path: str = ""
    json: Any = None
    status: int = 404


JOB, JOBS = "/v1/fine_tuning/jobs/{job_id}", "/v1/fine_tuning/jobs"
HOOK = "/v1/webhook_endpoints/{endpoint_id}"
DRIVER = "/internal/jobs/{job_id}/attempts/{attempt}"
ENGINE = "/internal/engines/{engine_id}"
OPERATOR = "/internal/operator/keys"
NEW_HOOK = {"name": "x", "url": "https://8.8.8.8/", "event_types": ["fine_tuning.job.failed"]}
GRADER = {"type": "string_check", "input": "a", "reference": "a", "operation": "eq"}

CASES = {
    ("GET", "/v1/files"): Case("own"),
    ("POST", "/v1/files"): Case("own", json={"path": "{root}/own.jsonl", "purpose": "fine-tune"}),
    ("GET", "/v1/files/{file_id}"): Case("hidden"),
    ("GET", "/v1/files/{file_id}/content"): Case("hidden"),
    ("DELETE", "/v1/files/{file_id}"): Case("hidden"),
    ("GET", JOBS): Case("own"),
    ("POST", JOBS): Case("hidden", json={"model": "{base}", "training_file": "{file_id}"}, status=400),
    ("POST", JOBS + "/validate"): Case(
        "hidden", json={"model": "{base}", "training_file": "{file_id}"}, status=200
    ),
    ("GET", JOB): Case("hidden"),
    ("POST", JOB + "/cancel"): Case("hidden"),
    ("POST", JOB + "/pause"): Case("hidden"),
    ("POST", JOB + "/resume"): Case("hidden"),
    ("GET", JOB + "/events"): Case("hidden"),
    ("GET", JOB + "/checkpoints"): Case("hidden"),
    ("GET", JOB + "/weights"): Case("hidden"),
    ("GET", JOB + "/report"): Case("hidden"),
    ("GET", JOB + "/logs"): Case("hidden"),
    ("POST", "/v1/fine_tuning/alpha/graders/validate"): Case("own", json={"grader": GRADER}),
    ("POST", "/v1/fine_tuning/alpha/graders/run"): Case("own", json={"grader": GRADER, "model_sample": "a"}),
    ("GET", "/v1/fine_tuning/validations"): Case("own"),
    ("GET", "/v1/fine_tuning/validations/{validation_id}"): Case("hidden"),
    ("GET", "/v1/fine_tuning/validations/{validation_id}/report"): Case("hidden"),
    ("GET", "/v1/models"): Case("own"),
    ("GET", "/v1/models/{name:path}"): Case("hidden", path="/v1/models/{model}"),
    ("DELETE", "/v1/models/{name:path}"): Case("hidden", path="/v1/models/{model}"),
    ("POST", "/v1/completions"): Case("hidden", json={"model": "{model}", "prompt": "a"}),
    ("POST", "/v1/chat/completions"): Case(
        "hidden", json={"model": "{model}", "messages": [{"role": "user", "content": "a"}]}
    ),
    ("GET", "/v1/webhook_endpoints"): Case("own"),
    ("POST", "/v1/webhook_endpoints"): Case("own", json=NEW_HOOK),
    ("GET", HOOK): Case("hidden"),
    ("POST", HOOK): Case("hidden", json={"name": "mine now"}),
    ("DELETE", HOOK): Case("hidden"),
    ("POST", HOOK + "/rotate_secret"): Case("hidden", json={}),
    ("POST", HOOK + "/test"): Case("hidden", json={"event_type": "fine_tuning.job.failed"}),
    ("GET", "/v1/webhook_event_types"): Case("own"),
    ("GET", DRIVER): Case("driver"),
    ("GET", DRIVER + "/files/{role}"): Case("driver", path=DRIVER + "/files/training_file"),
    ("POST", DRIVER + "/heartbeat"): Case("driver", json={"step": 99}),
    ("POST", DRIVER + "/events"): Case("driver", json={"events": [{"seq": 1, "message": "forged"}]}),
    ("POST", DRIVER + "/checkpoints"): Case("driver", json={"step": 1, "path": "{root}"}),
    ("POST", DRIVER + "/checkpoints/prune"): Case("driver", json={"path": "{root}"}),
    ("POST", DRIVER + "/transition"): Case("driver", json={"to": "failed"}),
    ("POST", ENGINE + "/heartbeat"): Case(
        "driver", json={"address": "http://127.0.0.1:1", "ready": True, "active": 0}
    ),
    ("POST", ENGINE + "/left"): Case("driver", json={"outcome": "forged"}),
    ("GET", OPERATOR): Case("driver"),
    ("POST", OPERATOR): Case("driver", json={"name": "forged"}),
    ("DELETE", OPERATOR): Case("driver"),
    ("POST", OPERATOR + "/{key_id}/revoke"): Case("driver", path=OPERATOR + "/0/revoke"),
    ("GET", "/healthz"): Case("open"),
    ("GET", "/readyz"): Case("open"),
    ("GET", "/metrics"): Case("open"),
    ("GET", "/openapi.json"): Case("open"),
    ("GET", "/docs"): Case("open"),
    ("GET", "/"): Case("open"),
    ("GET", "/web/{path:path}"): Case("open", path="/web/style.css"),
}

# The first tenant's things, named where the second one's own requests take names.
NAMED_IN_REQUESTS = {
    "model": ("POST", JOBS, {"model": "{model}", "training_file": "{own_file}"}),
    "checkpoint": ("POST", JOBS, {"model": "{checkpoint}", "training_file": "{own_file}"}),
    "asked checkpoint": ("POST", "/v1/completions", {"model": "{checkpoint}", "prompt": "a"}),
    "behavior model": (
        "POST",
        JOBS,
        {"model": "{base}", "training_file": "{own_file}", "behavior_model": "{model}"},
    ),
    "retention file": (
        "POST",
        JOBS,
        {"model": "{base}", "training_file": "{own_file}", "retention_file": "{file_id}"},
    ),
    "result file": ("POST", JOBS, {"model": "{base}", "training_file": "{result_file}"}),
    "files' cursor": ("GET", "/v1/files?after={file_id}", None),
    "jobs' cursor": ("GET", JOBS + "?after={job_id}", None),
    "validations' cursor": ("GET", "/v1/fine_tuning/validations?after={validation_id}", None),
    "endpoints' cursor": ("GET", "/v1/webhook_endpoints?after={endpoint_id}", None),
    "result": ("GET", "/v1/files/{result_file}/content", None),
}


@dataclass(frozen=True)
class World:
    """One service, two tenants: all that the first has, and the second one's key."""

    running: Running
    known: tuple[dict[str, str], ...]  # ids of the first tenant, of an ended job and of a living one
    nobody: dict[str, str]  # of the same form, and of nobody
    key: str
    own_token: str  # of the second tenant's own driver

    def ask(
        self, method: str, path: str, body: Any, names: dict[str, str], key: str | None
    ) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}", "X-Modeseek-Fence": "1"}
        sent = None if body is None else json.loads(fill(json.dumps(body), names))
        with self.running.http(headers=headers) as http:
            return http.request(method, fill(path, names), json=sent)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("tenants")
    (directory / "data").mkdir()
    (directory / "data" / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with ExitStack() as stack:
        running = stack.enter_context(serving(directory, port=free_port()))
        done, living = running.submit(metadata={"secret": "of-the-first"}), running.submit()
        running.finish(done)
        for job_id in (done, living):
            running.home.results(job_id).mkdir(parents=True, exist_ok=True)
            running.home.report_html(job_id).write_text("of-the-first")
            running.home.weights_parquet(job_id).write_bytes(b"of-the-first")
        running.driver(living)
        store = running.store
        body = running.body()
        with running.http() as http:
            check = http.post(JOBS + "/validate?score=true", json=body).json()["id"]
        running.home.outlook_html(check).write_text("of-the-first")
        hook = store.webhooks.create(
            "default", "of-the-first", "https://8.8.8.8/", ["fine_tuning.job.failed"]
        ).id
        finished = store.jobs.get(done)
        [checkpoint] = store.jobs.checkpoints(done).data
        store.keys.create("first", tenant_id="default")
        key, _ = store.keys.create("second", tenant_id="other")
        own_file = store.files.add(
            "file-own", "own.jsonl", "fine-tune", directory / "data" / "own.jsonl",
            num_bytes=36, owned=False, tenant_id="other",
        ).id  # fmt: skip
        with running.http(headers={"Authorization": f"Bearer {key}"}) as http:
            own_job = http.post(JOBS, json={"model": str(running.model), "training_file": own_file}).json()[
                "id"
            ]
        running.driver(own_job)
        names = {
            "engine_id": store.engines.want("base", str(running.model)).id,
            "file_id": body["training_file"],
            "validation_id": check,
            "endpoint_id": hook,
            "model": finished.fine_tuned_model or "",
            "checkpoint": checkpoint.model,
            "result_file": finished.result_files[0],
            "attempt": "1",
            "base": str(running.model),
            "own_file": own_file,
            "root": str(directory / "data"),
        }
        nobody = {
            **names,
            "file_id": f"file-{'x' * 24}",
            "result_file": f"file-{'y' * 24}",
            "validation_id": f"check-{'x' * 24}",
            "endpoint_id": f"whe-{'x' * 24}",
            "job_id": f"ftjob-{'x' * 24}",
            "model": "ft:base:default::xxxxxxxxxxxx",
            "checkpoint": "ft:base:default::xxxxxxxxxxxx:ckpt-step-2",
        }
        known = tuple({**names, "job_id": job_id} for job_id in (done, living))
        yield World(running, known, nobody, key, running.launcher.secrets[own_job]["token"])


def fill(template: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def told(answer: httpx.Response, names: dict[str, str]) -> tuple[int, str]:
    """What an answer says, without the very ids that were asked for."""
    text = answer.text
    for name, value in sorted(names.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{name}>") if name != "attempt" else text
    return answer.status_code, text


def secrets_of(world: World) -> set[str]:
    shared = {"attempt", "base", "own_file", "root"}
    ids = {value for names in world.known for name, value in names.items() if name not in shared}
    return ids | {"of-the-first"}


def everything(world: World) -> tuple[dict[str, set[str]], dict[str, str]]:
    """All rows that are not the second tenant's, and the digest of every file of the first one's jobs."""
    store, rows = world.running.store, {}
    moving = {"keys", "leases", "webhook_deliveries", "tenants"}
    with store.database.read() as connection:
        for table in metadata.sorted_tables:
            if table.name not in moving:
                rows[table.name] = {str(tuple(row)) for row in connection.execute(table.select())}
    roots = [world.running.home.job(names["job_id"]) for names in world.known]
    paths = [path for root in roots for path in root.rglob("*") if path.is_file()]
    return rows, {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def table_of(app: Any) -> set[tuple[str, str]]:
    """Method and path of every route, hidden ones included."""
    return {(m, r.path) for r in app.routes for m in (r.methods or ()) if m not in ("HEAD", "OPTIONS")}


def test_every_route_has_a_case(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.prepare()
    store = Store(home.store_url)
    assert table_of(create_app(home, store)) == set(CASES)
    store.close()


def test_the_second_tenant_learns_and_changes_nothing(world: World) -> None:
    before = everything(world)
    for (method, route), case in CASES.items():
        path = case.path or route
        for names in world.known:
            if case.kind == "hidden":
                seen = world.ask(method, path, case.json, names, world.key)
                of_nobody = world.ask(method, path, case.json, world.nobody, world.key)
                assert told(seen, names) == told(of_nobody, world.nobody), (method, route)
                assert seen.status_code == case.status, (method, route, seen.text)
                if case.status != 200:
                    assert seen.json()["error"]["code"].endswith("not_found"), seen.text
            elif case.kind == "own":
                seen = world.ask(method, path, case.json, names, world.key)
                assert seen.status_code == 200, (method, route, seen.text)
                assert not [s for s in secrets_of(world) if s in seen.text], (method, route)
            elif case.kind == "open":
                seen = world.ask(method, path, case.json, names, None)
                assert seen.status_code == 200, (method, route, seen.text)
                assert not [s for s in secrets_of(world) if s in seen.text], (method, route)
            else:
                for key in (world.key, world.own_token, None):
                    seen = world.ask(method, path, case.json, names, key)
                    assert (seen.status_code, seen.json()["error"]["code"]) == (401, "invalid_api_key"), route
    rows, files = everything(world)
    assert files == before[1]
    for name, had in before[0].items():
        assert had <= rows[name], f"{name}: {had - rows[name]}"


@pytest.mark.parametrize("what", NAMED_IN_REQUESTS)
def test_what_others_own_cannot_be_named(world: World, what: str) -> None:
    method, path, body = NAMED_IN_REQUESTS[what]
    for names in world.known:
        seen = world.ask(method, path, body, names, world.key)
        assert told(seen, names) == told(
            world.ask(method, path, body, world.nobody, world.key), world.nobody
        ), seen.text
        assert seen.status_code in (400, 404), seen.text


def test_of_a_model_in_use_others_hear_as_of_none(world: World) -> None:
    """The living job of its owner reads it: no word of that to anybody else."""
    names = world.known[0]
    running = world.running
    own, _ = running.store.keys.create("first again")
    with running.http(headers={"Authorization": f"Bearer {own}"}) as http:
        body = {"model": names["model"], "training_file": names["file_id"]}
        made = http.post(JOBS, json=body)
        assert made.status_code == 200, made.text
        assert http.delete(f"/v1/models/{names['model']}").json()["error"]["code"] == "model_in_use"
    seen = world.ask("DELETE", "/v1/models/{model}", None, names, world.key)
    assert (seen.status_code, seen.json()["error"]["code"]) == (404, "model_not_found")
    running.store.jobs.cancel(made.json()["id"])


def test_one_idempotency_key_in_two_hands_makes_two_jobs(world: World) -> None:
    running, names = world.running, world.known[0]
    own, _ = running.store.keys.create("first once more")
    body = {"model": names["base"], "training_file": names["file_id"]}
    theirs = {"model": names["base"], "training_file": names["own_file"]}
    ids = []
    for key, sent in ((own, body), (world.key, theirs)):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "the same"}
        with running.http(headers=headers) as http:
            answer = http.post(JOBS, json=sent)
            assert answer.status_code == 200, answer.text
            ids.append(answer.json()["id"])
    assert ids[0] != ids[1]
    for job_id in ids:
        running.store.jobs.cancel(job_id)


def test_without_keys_there_is_one_tenant(tmp_path: Path) -> None:
    """A header cannot make another of it."""
    home = Home(tmp_path)
    home.prepare()
    store = Store(home.store_url)
    store.jobs.submit("ftjob-one", {"model": "m", "training_file": "f"})
    app = create_app(home, store, validator=_Never())
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        listed = client.get(JOBS, headers={"OpenAI-Organization": "other"})
    assert [job["organization_id"] for job in listed.json()["data"]] == ["default"]
    store.close()


class _Never:
    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        raise AssertionError(job_id)
