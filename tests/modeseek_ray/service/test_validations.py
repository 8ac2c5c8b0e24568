"""Looking before training over HTTP: the real validation process on a small model, polled to its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.launcher import ValidationOutcome
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.validation import ProcessValidator
from modeseek_ray.service import ServiceSettings, create_app
from modeseek_ray.service.validations import Validations

URL = "/v1/fine_tuning/jobs/validate?score=true"


class Held:
    """Validates nothing until it is told to."""

    def __init__(self) -> None:
        self.scored: list[str] = []
        self.go = asyncio.Event()

    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        self.scored += [job_id] if score else []
        await self.go.wait()
        return ValidationOutcome(True)


def application(tmp_path: Path, validator: Any, root: Path) -> TestClient:
    home = Home(tmp_path / "home")
    home.prepare()
    app = create_app(
        home, Store(home.store_url), validator=validator, settings=ServiceSettings(roots=(root,))
    )
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def waiting(tmp_path: Path, tiny_dense: Path, held: Held) -> Iterator[TestClient]:
    with application(tmp_path, held, tiny_dense.parent) as client:
        yield client


def body(client: TestClient, model: Path, **changes: Any) -> dict[str, Any]:
    rows = [
        {"prompt": f"say {i}", "completion": "x" * (1 + 8 * (i % 4)), "task": f"t{i % 2}"} for i in range(8)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    sent = client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})
    return {"model": str(model), "training_file": sent.json()["id"], **changes}


def test_a_look_over_http_with_the_real_process(tmp_path: Path, tiny_dense: Path) -> None:
    home = Home(tmp_path / "home")
    with application(tmp_path, ProcessValidator(home), tiny_dense.parent) as client:
        answer = client.post(URL, json=body(client, tiny_dense))
        assert answer.status_code == 202, answer.text
        started = answer.json()
        assert (started["status"], started["result"]) == ("queued", None)
        deadline = time.monotonic() + 120
        while (found := client.get(started["url"]).json())["status"] != "finished":
            assert time.monotonic() < deadline
            time.sleep(0.2)
    result = found["result"]
    assert result["valid"], result["error"]
    outlook = result["report"]["outlook"]
    assert (outlook["num_rows"], outlook["num_rows_file"]) == (8, 8)
    assert [seen["name"] for seen in outlook["outlooks"]] == [
        "this job",
        "sft",
        "flow",
        "anchored",
        "mode_seeking",
    ]
    assert {part["label"] for part in outlook["outlooks"][2]["by_source"]} == {"t0", "t1"}
    assert not home.job(found["id"]).exists()


def test_what_is_wrong_already_is_said_at_once(waiting: TestClient, held: Held, tiny_dense: Path) -> None:
    answer = waiting.post(URL, json=body(waiting, tiny_dense, training_file="file-none"))
    assert answer.status_code == 200
    assert (answer.json()["valid"], answer.json()["error"]["code"]) == (False, "file_not_found")
    assert held.scored == []


def test_one_runs_and_the_others_wait_up_to_a_limit(
    waiting: TestClient, held: Held, tiny_dense: Path
) -> None:
    job = body(waiting, tiny_dense)
    urls = [waiting.post(URL, json=job).json()["url"] for _ in range(8)]
    assert [waiting.get(url).json()["status"] for url in urls] == ["running"] + ["queued"] * 7
    refused = waiting.post(URL, json=job)
    assert not refused.json()["valid"] and "under way" in refused.json()["error"]["message"]
    assert held.scored == [urls[0].rsplit("/", 1)[1]]


async def test_nobody_elses_is_found(tmp_path: Path, held: Held) -> None:
    validations = Validations(Home(tmp_path), held)
    validations.start("check-1", "mine")
    assert validations.get("check-1", "mine").status == "queued"
    with pytest.raises(NotFoundError):
        validations.get("check-1", "theirs")
    await validations.close()


async def test_one_that_cannot_be_run_ends_and_lets_the_next_run(tmp_path: Path) -> None:
    class Broken:
        async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
            raise OSError("no more processes")

    validations = Validations(Home(tmp_path), Broken())
    for name in ("check-1", "check-2"):
        validations.start(name, "mine")
    async with asyncio.timeout(20):
        while validations.get("check-2", "mine").status != "finished":
            await asyncio.sleep(0.01)
    for name in ("check-1", "check-2"):
        result = validations.get(name, "mine").result
        assert result is not None and result.error is not None and not result.valid
        assert "no more processes" in result.error.message


def test_an_unknown_one_is_not_found(waiting: TestClient) -> None:
    answer = waiting.get("/v1/fine_tuning/validations/check-none")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
