"""What a user might send to read, fill or run more than is theirs: each is refused with a code of its own."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from modeseek_ray.jobs.models import ModelInfo, resolve_model
from modeseek_ray.jobs.paths import Home, allowed_path

JOBS = "/v1/fine_tuning/jobs"
MIB = 2**20


@pytest.fixture(scope="module")
def data(service: Any) -> Path:
    """An allowed root with one good file."""
    root = service.home.root.parent / "data"
    root.mkdir(exist_ok=True)
    (root / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (root.parent / "outside.jsonl").write_text('{"prompt": "a", "completion": "secret"}\n')
    return Path(root)


def post(service: Any, path: str, body: Any) -> tuple[int, str]:
    with service.http() as http:
        answer = http.post(path, json=body)
    return answer.status_code, answer.json().get("error", {}).get("code", "")


def register(service: Any, path: Any) -> tuple[int, str]:
    return post(service, "/v1/files", {"path": str(path), "purpose": "fine-tune"})


def test_paths_lead_nowhere_but_under_the_roots(service: Any, data: Path) -> None:
    outside = data.parent / "outside.jsonl"
    (data / "link.jsonl").symlink_to(outside)
    (data / "directory").symlink_to(data.parent)
    escapes = [
        outside, data / "../outside.jsonl", data / "link.jsonl", data / "directory" / "outside.jsonl",
        "/etc/passwd", "/proc/self/environ", "/dev/zero", "outside.jsonl", "~/x", "file:///etc/passwd",
        "https://example.org/a.jsonl", str(data) + "2/good.jsonl", "//etc/passwd",
    ]  # fmt: skip
    assert register(service, data / "good.jsonl") == (200, "")
    for path in escapes:
        assert register(service, path) == (400, "path_not_allowed"), path
        assert post(service, JOBS, service.body(model=str(path)))[0] == 400, path
        # A file's name is its id, never a path.
        assert post(service, JOBS, service.body(training_file=str(path))) == (400, "file_not_found"), path


def test_what_is_no_file_is_not_waited_for(service: Any, data: Path) -> None:
    os.mkfifo(data / "pipe")
    (data / "empty").touch()
    for name in ("pipe", "empty"):
        assert register(service, data / name) == (400, "empty_file"), name
    for name in ("", "none.jsonl"):
        assert register(service, data / name) == (400, "file_not_found"), name


def test_a_link_that_takes_a_registered_files_place_is_not_followed(service: Any, data: Path) -> None:
    path = data / "moved.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with service.http() as http:
        file_id = http.post("/v1/files", json={"path": str(path)}).json()["id"]
        assert http.get(f"/v1/files/{file_id}/content").status_code == 200
        path.unlink()
        path.symlink_to(data.parent / "outside.jsonl")
        answer = http.get(f"/v1/files/{file_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "path_not_allowed")
    assert "secret" not in answer.text
    refused = post(service, JOBS, {"model": str(service.model), "training_file": file_id})
    assert refused == (400, "path_not_allowed")


def test_a_root_around_the_home_does_not_open_the_home(tmp_path: Path) -> None:
    """Else the store, with what keys are compared with, could be registered as a file and read."""
    home = Home(tmp_path / "home")
    home.prepare()
    inside = home.job("ftjob-1") / "model" / "config.json"
    assert allowed_path(tmp_path / "x.jsonl", [tmp_path], home) == tmp_path / "x.jsonl"
    for roots in ([tmp_path], [home.root], [Path("/")], []):
        for path in (home.root, home.root / "store.sqlite3", home.files / "file-1", inside):
            assert allowed_path(path, roots, home) is None
    assert allowed_path(inside, [home.job("ftjob-1")], home) == inside  # named on purpose


def test_the_store_cannot_be_registered(start_service: Any, tmp_path: Path) -> None:
    service = start_service(roots=(tmp_path,))
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert register(service, tmp_path / "good.jsonl") == (200, "")
    uploaded = service.upload()
    for path in (service.home.root / "store.sqlite3", service.home.file(uploaded)):
        assert path.is_file()
        assert register(service, path) == (400, "path_not_allowed")


@pytest.mark.parametrize("path", ["/v1/files", JOBS, JOBS + "/validate"])
def test_packed_bodies_are_refused_unread(service: Any, path: str) -> None:
    """A megabyte that unpacks to a gigabyte."""
    bomb = gzip.compress(bytes(64 * MIB), 9) * 16
    types = ["application/json"] + (["multipart/form-data; boundary=b"] if path == "/v1/files" else [])
    for content_type in types:
        for encoding in ("gzip", "deflate", "br", "zstd", "GZIP", "gzip, identity", "identity, gzip"):
            before = psutil.Process().memory_info().rss
            with service.http(headers={"Content-Type": content_type, "Content-Encoding": encoding}) as http:
                answer = http.post(path, content=bomb)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_encoding")
            assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_a_small_parquet_file_that_unpacks_to_much_is_not_read_while_somebody_waits(
    service: Any, tmp_path: Path
) -> None:
    rows = [f"{i}{'a' * MIB}" for i in range(300)]
    table = pyarrow.table({"prompt": rows, "completion": ["b"] * 300})
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    content = (tmp_path / "bomb.parquet").read_bytes()
    assert len(content) < MIB
    del table, rows
    body = {"model": str(service.model), "training_file": service.upload(content, "bomb.parquet")}
    before = psutil.Process().memory_info().rss
    with service.http() as http:  # accepted: the validation process looks at the rows
        assert http.post(JOBS, json=body).status_code == 200
    assert psutil.Process().memory_info().rss - before < 128 * MIB


def raw(service: Any, head: str) -> tuple[bytes, int]:
    """Send only a request's head; the answer, and how many bytes of body had been sent by then: none."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        answer = connection.recv(65536)
        while chunk := connection.recv(65536):  # until the service closes
            answer += chunk
        return answer, 0


def test_ten_gigabytes_that_are_announced_are_refused_before_they_come(service: Any) -> None:
    answer, sent = raw(
        service,
        f"POST /v1/files HTTP/1.1\nHost: localhost\nContent-Length: {10 * 2**30}\nExpect: 100-continue\n"
        "Content-Type: multipart/form-data; boundary=b\n\n",
    )
    assert answer.startswith(b"HTTP/1.1 413") and b'"file_too_large"' in answer and sent == 0
    assert b"100 Continue" not in answer


def test_ten_gigabytes_that_are_not_announced_end_at_the_limit_in_flat_memory(start_service: Any) -> None:
    service = start_service(max_upload_bytes=128 * MIB)
    process, sent, peak = psutil.Process(), 0, 0
    row = b'{"prompt": "one plus one is", "completion": " two"}\n' * 20_000  # a megabyte
    before = process.memory_info().rss

    def endless(total: int) -> Iterator[bytes]:
        nonlocal sent, peak
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
        while sent < total:
            sent += len(row)
            peak = max(peak, process.memory_info().rss - before)
            yield row
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with service.http() as http:
        try:
            answer = http.post("/v1/files", content=endless(10 * 2**30), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
        except httpx.TransportError:
            pass  # the service closed while we were sending: as it should
        assert sent < 256 * MIB
        assert list(service.home.files.iterdir()) == []
        sent = 0
        kept = http.post("/v1/files", content=endless(100 * MIB), headers=headers)  # fits: all of it is kept
    assert kept.status_code == 200 and kept.json()["bytes"] >= 100 * MIB
    assert peak < 48 * MIB


def model_with(make_model: Any, path: Path, **config: Any) -> Path:
    return Path(make_model(path, **config))


def test_models_that_run_code_are_refused(service: Any, make_model: Any) -> None:
    root = service.model.parent
    own_code = model_with(make_model, root / "own-code", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (own_code / "modeling.py").write_text("raise SystemExit('this must never run')")
    pickled = model_with(make_model, root / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    leads_out = model_with(make_model, root / "leads-out")
    (leads_out / "tokenizer.json").unlink()
    (leads_out / "tokenizer.json").symlink_to("/etc/passwd")
    codes = {own_code: "remote_code", pickled: "unsafe_weights", leads_out: "path_not_allowed"}
    for path, code in codes.items():
        for changes in ({"model": str(path)}, {"behavior_model": str(path)}):
            assert post(service, JOBS, service.body(**changes)) == (400, code), (path, changes)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        json.dumps({"w": {"dtype": "F32", "shape": ["a"]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": 5}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [-1, 2]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [10**30]}}).encode(),
        b'{"w": {"shape": [NaN]}}',
        b'{"w": {"shape": [' + b"9" * 5000 + b"]}}",
    ],
    ids=["deep", "words", "number", "negative", "huge", "NaN", "digits"],
)
def test_headers_of_weight_files_that_are_not_what_they_should_be(
    service: Any, make_model: Any, header: bytes, request: pytest.FixtureRequest
) -> None:
    path = model_with(make_model, service.model.parent / f"header-{request.node.callspec.id}")
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert post(service, JOBS, service.body(model=str(path))) == (400, "invalid_model")


@pytest.mark.parametrize("config", [b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": Infinity}', b"\xff"])
def test_configurations_of_models_that_are_not_what_they_should_be(
    service: Any, make_model: Any, config: bytes, tmp_path: Path
) -> None:
    path = model_with(make_model, service.model.parent / tmp_path.name)
    (path / "config.json").write_bytes(config)
    assert post(service, JOBS, service.body(model=str(path))) == (400, "invalid_model")


def test_a_directory_of_links_under_the_root_is_a_model(make_model: Any, tmp_path: Path) -> None:
    """As the hub's own cache lays them out."""
    blobs = model_with(make_model, tmp_path / "models" / "blobs")
    snapshot = tmp_path / "models" / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    found = resolve_model(str(snapshot), Home(tmp_path / "home"), [tmp_path / "models"])
    assert ModelInfo.read(found).num_parameters == 20
