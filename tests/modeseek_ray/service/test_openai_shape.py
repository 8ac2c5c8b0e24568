"""The unmodified `openai` client against the real service: every call it has for files, jobs and models."""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path
from typing import Any

import openai
import pyarrow
import pyarrow.parquet
import pytest

from modeseek_ray.errors import ServiceError
from modeseek_ray.reports.ledger import SCHEMA


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return service.openai()


def test_files_from_upload_to_deletion(service: Any, client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' * 100_000)  # several chunks
    file = client.files.create(file=path, purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "train.jsonl",
        path.stat().st_size,
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == path.read_bytes()
    assert file.id in {listed.id for listed in client.files.list()}
    assert client.files.delete(file.id).deleted
    assert not service.home.file(file.id).exists()
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(file.id)
    assert caught.value.code == "file_not_found"
    assert caught.value.request_id


def test_pause_and_resume(service: Any, client: openai.OpenAI, until: Any) -> None:
    job = service.submit()
    driver = service.driver(job)

    async def pause_when_told() -> None:
        assert await driver.heartbeat({"step": 1}) == "pause"
        await driver.transition("paused")
        await driver.close()

    assert client.fine_tuning.jobs.pause(job).status == "running"
    asyncio.run(pause_when_told())
    assert client.fine_tuning.jobs.pause(job).status == "paused"
    assert client.fine_tuning.jobs.resume(job).status in ("queued", "running")
    until(lambda: service.store.jobs.get(job).attempt == 2)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.resume(job)
    assert refused.value.code == "illegal_transition"
    client.fine_tuning.jobs.cancel(job)


def test_files_are_paged_both_ways(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}.jsonl", b"{}\n"), purpose="fine-tune").id for i in range(3)]
    newest = [file.id for file in client.files.list(limit=2)]  # the iterator asks for further pages
    assert newest[:3] == made[::-1]
    oldest = [file.id for file in client.files.list(limit=2, order="asc")]
    assert oldest == newest[::-1]


def test_a_job_from_creation_to_model(service: Any, client: openai.OpenAI) -> None:
    training_file = service.upload()
    job = client.fine_tuning.jobs.create(
        model=str(service.model),
        training_file=training_file,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        suffix="mine",
        seed=7,
        metadata={"purpose": "shape"},
    )
    assert (job.status, job.seed, job.hyperparameters.n_epochs) == ("validating_files", 7, 2)
    assert job.hyperparameters.batch_size == "auto"
    service.finish(job.id)

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("ft:base:default:mine:")
    assert (done.trained_tokens, done.hyperparameters.batch_size) == (123, 3)
    assert done.finished_at is not None and done.finished_at >= done.created_at
    assert done.progress["step"] == 2  # type: ignore[attr-defined]

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert events[-1].message.startswith("Created fine-tuning job")
    assert events[0].message == "The job has successfully completed."
    metrics = [event.data["loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert metrics == [1.0, 2.0]
    assert len({event.id for event in events}) == len(events)

    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.step_number == 2
    name = checkpoint.fine_tuned_model_checkpoint
    assert name == f"{done.fine_tuned_model}:ckpt-step-2"
    assert checkpoint.metrics.train_loss == 1.0

    [result] = done.result_files
    rows = list(csv.reader(client.files.content(result).text.splitlines()))
    assert rows == [["step", "loss"], ["1", "2.0"]]

    assert client.models.retrieve(done.fine_tuned_model).owned_by == "default"
    assert done.fine_tuned_model in {model.id for model in client.models.list()}
    follow_up = client.fine_tuning.jobs.create(model=done.fine_tuned_model, training_file=training_file)
    assert follow_up.model == done.fine_tuned_model
    with pytest.raises(openai.BadRequestError, match="still reads this model"):
        client.models.delete(done.fine_tuned_model)
    client.fine_tuning.jobs.cancel(follow_up.id)
    with pytest.raises(openai.BadRequestError, match="checkpoint to resume from"):
        client.fine_tuning.jobs.create(model=name, training_file=training_file)
    assert client.models.delete(done.fine_tuned_model).deleted
    assert not service.home.model(job.id).exists()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)


def test_weighted_jobs_and_our_extra_fields(service: Any, client: openai.OpenAI) -> None:
    method: Any = {"type": "weighted", "weighted": {"likelihood": {"scheme": "ratio_power", "gamma": 0.5}}}
    job = client.fine_tuning.jobs.create(
        model=str(service.model),
        training_file=service.upload(),
        method=method,
        extra_body={"retention_file": service.upload(), "resources": {"trainers": 2}},
    )
    assert job.to_dict()["method"]["type"] == "weighted"  # type: ignore[index]
    assert job.resources["trainers"] == 2  # type: ignore[attr-defined]
    assert job.retention_file.startswith("file-")  # type: ignore[attr-defined]
    client.fine_tuning.jobs.cancel(job.id)


def test_cancel_of_a_running_job_is_quick(service: Any, client: openai.OpenAI, until: Any) -> None:
    job_id = service.submit()
    driver = service.driver(job_id)
    asyncio.run(driver.transition("running"))
    assert client.fine_tuning.jobs.cancel(job_id).status == "running"
    until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "cancelled", 3)
    assert service.launcher.statuses[f"{job_id}-1"] == "stopped"
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(job_id)
    assert caught.value.code == "illegal_transition"


def test_jobs_are_paged_and_filtered(service: Any, client: openai.OpenAI) -> None:
    made = [service.submit(metadata={"series": "paged", "i": str(i)}) for i in range(3)]
    found = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"series": "paged"})]
    assert found == made[::-1]
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"series": "paged", "i": "1"})] == [made[1]]
    for job_id in made:
        client.fine_tuning.jobs.cancel(job_id)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"training_file": "file-none"}, "training_file", "file_not_found"),
        ({"model": "/etc"}, "model", "path_not_allowed"),
        ({"model": "gpt-4o"}, "model", "model_not_found"),
        ({"model": "ft:none"}, "model", "model_not_found"),
        ({"seed": "7"}, "seed", "invalid_config"),
        ({"sed": 7}, "sed", "invalid_config"),
        ({"suffix": "x" * 65}, "suffix", "invalid_config"),
        ({"metadata": {"k": "v" * 513}}, None, "invalid_config"),
        ({"resources": {"zero_stage": 4}}, "resources.zero_stage", "invalid_config"),
    ],
)
def test_what_is_wrong_with_a_job_is_named(
    service: Any, client: openai.OpenAI, changes: dict[str, Any], param: str | None, code: str
) -> None:
    before = len(service.store.jobs.page(limit=100).data)
    with service.http() as http:
        answer = http.post("/v1/fine_tuning/jobs", json=service.body(**changes))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert answer.headers["x-request-id"]
    assert len(service.store.jobs.page(limit=100).data) == before


def test_bad_rows_are_named_by_file_and_line(service: Any) -> None:
    bad = service.upload(b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', name="mine.jsonl")
    with service.http() as http:
        answer = http.post("/v1/fine_tuning/jobs", json=service.body(training_file=bad))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("mine.jsonl:2: ")


def test_validate_says_the_same_and_starts_nothing(service: Any) -> None:
    before = len(service.store.jobs.page(limit=100).data)
    with service.client() as client:
        assert client.validate(service.body()) == {"valid": True, "error": None, "report": {"rows": 3}}
        found = client.validate(service.body(model="nothing"))
    assert (found["valid"], found["error"]["param"]) == (False, "model")
    assert len(service.store.jobs.page(limit=100).data) == before
    assert not list(service.home.jobs.glob("check-*"))


def test_the_ledger_as_rows_and_as_parquet(service: Any, tmp_path: Path) -> None:
    job_id = service.submit()
    with service.client() as client:
        path = service.home.weights_parquet(job_id)
        path.parent.mkdir()
        table = pyarrow.table({"row": list(range(10)), "weight": [float("nan")] + [1.0] * 9})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
        page = client.weights(job_id, after=2, limit=5)
        assert [row["row"] for row in page["data"]] == [2, 3, 4, 5, 6]
        assert (page["has_more"], page["total"]) == (True, 10)
        assert client.weights(job_id, limit=1)["data"] == [{"row": 0, "weight": None}]
        assert client.weights(job_id, after=10)["data"] == []
        saved = client.download_weights(job_id, tmp_path / "w.parquet")
        assert pyarrow.parquet.read_table(saved).num_rows == 10
        client.cancel(job_id)


def test_the_ledger_by_row_with_texts_and_what_to_collect(service: Any) -> None:
    """Row 0 gets .5 and .25, row 1 the rest; the ratio to the start says that row 0 is not mastered."""
    weighted = {"type": "weighted", "weighted": {"preset": "mode_seeking"}}
    four = service.upload(
        b'{"prompt": "one plus one is", "completion": " two"}\n' * 4
    )  # a floor of 0.3 can bind
    job_id = service.submit(method=weighted, training_file=four)
    path = service.home.weights_parquet(job_id)
    path.parent.mkdir()
    uses = [(1, 0, 0.5), (1, 1, 1.5), (2, 0, 0.25), (2, 1, 1.75)]
    rows = [{"step": s, "row": r, "weight": w, "num_tokens": 3, "is_replay": False} for s, r, w in uses]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), path)
    with service.client() as client:
        page = client.ledger(job_id, limit=1)
        assert (page["total"], page["has_more"]) == (2, True)
        assert (page["data"][0]["cumulative"], page["data"][0]["tokens"]) == (0.75, 6)
        assert page["data"][0]["text"] == {"prompt": "one plus one is", "completion": " two"}
        assert [row["row"] for row in page["collect_more"]] == [0]
        assert [row["row"] for row in page["sample_less"]] == [1]
        client.cancel(job_id)
    with service.http() as http:
        refused = http.get(f"/v1/fine_tuning/jobs/{job_id}/weights?view=ledger")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "format")


def test_registered_files_are_not_copied_and_not_deleted(service: Any, tmp_path: Path) -> None:
    data = service.model.parents[1] / "data"
    data.mkdir(exist_ok=True)
    path = data / "big.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n')
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    (data / "link").symlink_to(secret)
    with service.client() as client:
        file = client.register(path)
        assert client.content(file["id"]) == path.read_bytes()
        client.delete_file(file["id"])
        assert path.exists()
        for wrong in (
            secret,
            data / "link",
            data / ".." / ".." / "x",
            Path("big.jsonl"),
            data / "none",
            data,
        ):
            with pytest.raises(ServiceError) as caught:
                client.register(wrong)
            assert caught.value.http_status == 400, wrong


def test_a_file_in_use_stays(service: Any) -> None:
    body = service.body()
    with service.client() as client:
        job = client.submit(body)
        with pytest.raises(ServiceError, match="still reads this file") as caught:
            client.delete_file(body["training_file"])
        assert caught.value.code == "file_in_use"
        client.cancel(job["id"])
        client.wait(job["id"], timeout_s=10, poll_s=0.05)
        assert client.delete_file(body["training_file"])["deleted"]
