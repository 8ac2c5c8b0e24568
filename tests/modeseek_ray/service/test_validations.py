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
LIST = "/v1/fine_tuning/validations"


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
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


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
    asked = f"{URL}&preset=flow&preset=rwr&rows=6"
    with application(tmp_path, ProcessValidator(home), tiny_dense.parent) as client:
        answer = client.post(asked, json=body(client, tiny_dense))
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
    assert (outlook["num_rows"], outlook["num_rows_file"]) == (6, 8)
    assert [seen["name"] for seen in outlook["outlooks"]] == ["this job", "flow"]
    assert [each["name"] for each in outlook["impossible"]] == ["rwr"]
    with application(tmp_path, Held(), tiny_dense.parent) as client:  # another process of the service
        assert client.get(started["url"]).json() == found
        page = client.get(f"{started['url']}/report")
        assert page.headers["content-type"].startswith("text/html")
        assert page.text.count("<svg") == 6  # histogram, sources and lengths of two weightings


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


def test_a_preset_there_is_not_is_named_at_once(waiting: TestClient, held: Held, tiny_dense: Path) -> None:
    answer = waiting.post(f"{URL}&preset=flaw", json=body(waiting, tiny_dense)).json()
    assert (answer["valid"], answer["error"]["param"]) == (False, "preset")
    assert held.scored == [] and waiting.get(LIST).json()["data"] == []


async def test_a_restart_lists_what_was_finished_and_does_the_rest_again(home: Home) -> None:
    """Finished, running and queued, and a directory cut off before anybody was told of it."""
    first = Held()
    validations = Validations(home, first)
    for name in ("check-1", "check-2", "check-3"):
        validations.start(name, "mine")
        if name == "check-1":
            first.go.set()
            while validations.get(name, "mine").status != "finished":
                await asyncio.sleep(0.01)
            first.go.clear()
    while validations.get("check-2", "mine").status != "running":
        await asyncio.sleep(0.01)
    await validations.close()
    home.job("check-4").mkdir()

    second = Held()
    restarted = Validations(home, second)
    restarted.resume()
    listed = restarted.page("mine", None, 10)
    assert [(one.id, one.result) for one in listed.data] == [(f"check-{n}", None) for n in (3, 2, 1)]
    assert restarted.get("check-1", "mine").result is not None
    assert restarted.page("mine", "check-2", 10).data[0].id == "check-1"
    assert restarted.page("theirs", None, 10).data == []
    second.go.set()
    async with asyncio.timeout(20):
        while any(one.status != "finished" for one in restarted.page("mine", None, 10).data):
            await asyncio.sleep(0.01)
    assert second.scored == ["check-2", "check-3"]
    assert not home.job("check-4").exists()


async def test_only_the_newest_are_kept(home: Home, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeseek_ray.service.validations.KEPT", 2)
    validations = Validations(home, held)
    held.go.set()
    for name in ("check-1", "check-2", "check-3"):
        validations.start(name, "mine")
    async with asyncio.timeout(20):
        while len(validations.page("mine", None, 10).data) > 2 or home.job("check-1").exists():
            await asyncio.sleep(0.01)
    assert [one.id for one in validations.page("mine", None, 10).data] == ["check-3", "check-2"]


async def test_nobody_elses_is_found(home: Home, held: Held) -> None:
    validations = Validations(home, held)
    validations.start("check-1", "mine")
    assert validations.get("check-1", "mine").status == "queued"
    with pytest.raises(NotFoundError):
        validations.get("check-1", "theirs")
    await validations.close()


async def test_one_that_cannot_be_run_ends_and_lets_the_next_run(home: Home) -> None:
    class Broken:
        async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
            raise OSError("no more processes")

    validations = Validations(home, Broken())
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
