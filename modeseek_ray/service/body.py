"""A strict JSON body: what other parsers let pass or choke on is refused with a sentence.

Python's own parser takes NaN, keeps the last of two equal keys, turns 1e999 into infinity and
"\\ud800" into a string that nothing can store, and runs out of stack on deep nesting.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import Request

from modeseek_ray.service.errors import RequestError, TooLargeError

MAX_DEPTH = 64
_MAX_INT = 2**63 - 1
_MAX_INT_DIGITS = 19


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body, counted while it comes in. Raises `TooLargeError` and `RequestError`."""
    if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise RequestError(
            "compressed bodies are not accepted.", mend="Send it as it is.", code="invalid_encoding"
        )
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLargeError(f"the body is larger than {limit} bytes.", mend="Send large data as a file.")
        parts.append(part)
    return b"".join(parts)


async def read_json(request: Request, limit: int) -> Any:
    """The parsed body. Its content type is required: no foreign page can make a browser send it unasked."""
    _check_content_type(request)
    return parse_json(await read_body(request, limit))


async def read_optional_json(request: Request, limit: int) -> Any:
    """The same where a body may be left away; then it is an empty object."""
    body = await read_body(request, limit)
    if not body:
        return {}
    _check_content_type(request)
    return parse_json(body)


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(
            f"the content type is {content_type or 'missing'}.",
            mend="Send Content-Type: application/json.",
            code="invalid_content_type",
        )


def parse_json(body: bytes) -> Any:
    """Parse strictly. Raises `RequestError` with code `invalid_json`."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_int,
            parse_float=_float,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _invalid(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    _check_strings(value, 0)
    return value


def _check_strings(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _invalid(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        _check_string(value)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_string(key)
            _check_strings(item, depth + 1)


def _check_string(text: str) -> None:
    if "\0" in text:
        raise _invalid("a string holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid("a string holds half of a surrogate pair") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _invalid(f"the key {key[:64]!r} is given twice")
        result[key] = value
    return result


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_INT_DIGITS or abs(int(digits)) > _MAX_INT:
        raise _invalid(f"the number {digits[:24]} does not fit 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _invalid(f"the number {digits[:24]} is out of range")
    return number


def _refuse_constant(name: str) -> None:
    raise _invalid(f"{name} is not JSON")


def _invalid(what: str) -> RequestError:
    return RequestError(f"the body is not valid JSON: {what[:200]}.".encode("utf-8", "replace").decode(),
                        mend="Mend the body.", code="invalid_json")  # fmt: skip
