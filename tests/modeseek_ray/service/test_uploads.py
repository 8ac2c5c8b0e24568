"""Uploads that are too large, cut, malformed or misnamed leave nothing behind."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from modeseek_ray.service.upload import clean_filename


def leftovers(service: Any) -> list[str]:
    known = {record.id for record in service.store.files.page().data}
    return [path.name for path in service.home.files.iterdir() if path.name not in known]


def test_the_limit_is_counted_while_streaming(start_service: Any) -> None:
    """Declared or not (chunked), one byte over is too much, and exactly the limit is not."""
    service = start_service(max_upload_bytes=100_000)
    service.upload(b"x" * 100_000)

    def form() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield from (b"x" * 50_000 for _ in range(100))

    with service.http() as http:
        declared = http.post(
            "/v1/files", files={"file": ("a", b"x" * 100_001)}, data={"purpose": "fine-tune"}
        )
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "file_too_large")
        chunked = http.post(
            "/v1/files", content=form(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "file_too_large")
    assert leftovers(service) == []


@pytest.mark.parametrize(
    ("files", "data", "code"),
    [
        ({"file": ("a", b"")}, {"purpose": "fine-tune"}, "empty_file"),
        ({"file": ("a", b"x")}, {}, "invalid_purpose"),
        ({"file": ("a", b"x")}, {"purpose": "fine-tune-results"}, "invalid_purpose"),
        ({"other": ("a", b"x")}, {"purpose": "fine-tune"}, "invalid_request"),
        ([("file", ("a", b"x")), ("file", ("b", b"x"))], {"purpose": "fine-tune"}, "invalid_request"),
        ({"file": ("a", b"x")}, {"purpose": "x" * 2000}, "body_too_large"),
    ],
)
def test_forms_that_are_not_uploads(service: Any, files: Any, data: dict[str, str], code: str) -> None:
    with service.http() as http:
        answer = http.post("/v1/files", files=files, data=data)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["code"] == code, answer.text
    assert leftovers(service) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"garbage"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx'),
        ("multipart/form-data; boundary=" + "b" * 5000, b"--b"),
    ],
)
def test_malformed_forms(service: Any, content_type: str, body: bytes) -> None:
    with service.http() as http:
        answer = http.post("/v1/files", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 400, answer.text
    assert leftovers(service) == []


def test_a_cut_upload_leaves_nothing(service: Any, until: Any) -> None:
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 50_000
        )
        until(lambda: leftovers(service) != [])
    until(lambda: leftovers(service) == [])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a.jsonl", "a.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\a.jsonl", "a.jsonl"),
        ("a\r\nSet-Cookie: x", "aSet-Cookie: x"),
        ("", "file"),
        ("/", "file"),
        ("日本.jsonl", "日本.jsonl"),
    ],
)
def test_filenames_are_names(given: str, kept: str) -> None:
    assert clean_filename(given) == kept


def test_names_of_any_script_come_back(service: Any) -> None:
    file_id = service.upload(name='日本 "x".jsonl')
    with service.http() as http:
        answer = http.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
