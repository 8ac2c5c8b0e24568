"""JSON that breaks other services: refused with a sentence, never a 500."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeseek_ray.errors import ModeseekError
from modeseek_ray.service.body import MAX_DEPTH, parse_json
from modeseek_ray.service.errors import RequestError

BAD = {
    "NaN": b'{"seed": NaN}',
    "infinity": b'{"seed": -Infinity}',
    "overflow": b'{"seed": 1e999}',
    "30 digits": b'{"seed": 123456789012345678901234567890}',
    "5000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "64 bits": b'{"seed": 9223372036854775808}',
    "twice": b'{"seed": 1, "seed": 2}',
    "lone surrogate": rb'{"model": "\ud800"}',
    "lone surrogate key": rb'{"\udc00": 1}',
    "NUL": rb'{"model": "a\u0000b"}',
    "not UTF-8": b'{"model": "\xff"}',
    "deep": b"[" * 1000 + b"]" * 1000,
    "very deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 200 + b"1" + b"}" * 200,
    "cut": b'{"model": "a',
    "two": b"{} {}",
    "empty": b"",
    "spaces": b"  ",
    "single quotes": b"{'a': 1}",
    "trailing comma": b'{"a": 1,}',
    "comment": b'{"a": 1} // x',
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_refused(body: bytes) -> None:
    with pytest.raises(ModeseekError) as caught:
        parse_json(body)
    assert (caught.value.http_status, caught.value.code) == (400, "invalid_json")
    assert caught.value.mend
    caught.value.message.encode()  # itself fit to be sent


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_refused_over_http(service: Any, body: bytes) -> None:
    with service.http(headers={"Content-Type": "application/json"}) as http:
        for path in ("/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/validate", "/v1/files"):
            answer = http.post(path, content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b"true", b"{}", b'{"model": 1}'])
def test_json_of_the_wrong_shape(service: Any, body: bytes) -> None:
    with service.http(headers={"Content-Type": "application/json"}) as http:
        for path in ("/v1/fine_tuning/jobs", "/v1/files"):
            answer = http.post(path, content=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["code"] == "invalid_config"


def test_the_edges_that_are_allowed() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep.encode()) is not None
    assert parse_json(b"\xef\xbb\xbf{}") == {}
    assert parse_json(b'{"a": 9223372036854775807, "b": -9223372036854775807}')["a"] == 2**63 - 1
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_parse_or_are_refused(body: bytes) -> None:
    with suppress(RequestError):
        parse_json(body)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda children: st.lists(children) | st.dictionaries(TEXT, children),
    max_leaves=20,
)


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_good_json_comes_through_unchanged(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_bodies_are_counted_while_they_come(start_service: Any) -> None:
    service = start_service(max_body_bytes=1000)

    def endless() -> Any:
        for _ in range(10_000):
            yield b" " * 1000

    with service.http(headers={"Content-Type": "application/json"}) as http:
        answer = http.post("/v1/fine_tuning/jobs", content=endless())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_foreign_page_can_send_is_refused(service: Any, content_type: str) -> None:
    with service.http() as http:
        answer = http.post("/v1/fine_tuning/jobs", content=b"{}", headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_content_type")


def test_compressed_bodies_are_refused(service: Any) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with service.http(headers=headers) as http:
        assert http.post("/v1/fine_tuning/jobs", content=b"\x1f\x8b").status_code == 400
