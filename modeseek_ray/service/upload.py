"""A multipart upload, straight from the socket to its file: counted, hashed, and on disk when answered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.paths import sync_directory
from modeseek_ray.service.errors import RequestError, TooLargeError

_MAX_FIELD_BYTES = 1024
_WRITE_BYTES = 2**20
_OVERHEAD_BYTES = 2**16  # boundaries, headers and small fields around the file


@dataclass
class Upload:
    """A complete file under a draft name, and the form's small fields."""

    draft: Path
    filename: str = ""
    num_bytes: int = 0
    sha256: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def keep_as(self, target: Path) -> None:
        """Give the file its final name, for good."""
        self.draft.replace(target)
        sync_directory(target.parent)


class _Form:
    """Collects a form's parts from the parser's callbacks. File bytes go to `draft`."""

    def __init__(self, draft: Path, limit: int, over: ModeseekError) -> None:
        self.upload = Upload(draft)
        self._limit = limit
        self._over = over
        self._digest = hashlib.sha256()
        self._file = draft.open("wb")
        self._headers: dict[str, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._name = ""
        self._is_file = False
        self._value = b""
        self._buffer = bytearray()
        self.has_ended = False

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value_part,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    @property
    def is_full(self) -> bool:
        return len(self._buffer) >= _WRITE_BYTES

    def write(self) -> None:
        """Move what has come in to disk. Blocking: call it in a thread."""
        self._digest.update(self._buffer)
        self._file.write(self._buffer)
        self._buffer.clear()

    def finish(self) -> Upload:
        self.write()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.upload.sha256 = self._digest.hexdigest()
        return self.upload

    def discard(self) -> None:
        self._file.close()
        self.upload.draft.unlink(missing_ok=True)

    def _part_begin(self) -> None:
        self._headers, self._header_name, self._header_value = {}, b"", b""
        self._name, self._is_file, self._value = "", False, b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_part(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self.upload.filename:
                raise RequestError("the form has two files.", param="file", mend="Send one file per request.")
            self.upload.filename = clean_filename(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._buffer += data[start:end]
            self.upload.num_bytes += end - start
            if self.upload.num_bytes > self._limit:
                raise self._over
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise TooLargeError(f"the field is longer than {_MAX_FIELD_BYTES} bytes.", param=self._name[:64])

    def _part_end(self) -> None:
        if not self._is_file and self._name:
            self.upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.has_ended = True


async def receive_upload(
    request: Request, draft: Path, limit: int, over: ModeseekError | None = None
) -> Upload:
    """Read a form with one part called `file`. Nothing is left at `draft` when this raises.

    Raises `over` as soon as the file is over `limit` bytes, and `RequestError`.
    """
    over = over or _too_large(limit)
    if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise RequestError(
            "compressed bodies are not accepted.", mend="Send it as it is.", code="invalid_encoding"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit + _OVERHEAD_BYTES:
        raise over
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if b"boundary" not in options:
        raise RequestError("the form has no boundary.", mend="Send multipart/form-data.", code="invalid_form")
    form = _Form(draft, limit, over)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            parser.write(chunk)
            if form.is_full:
                await run_in_threadpool(form.write)
        parser.finalize()
        if not form.has_ended:
            raise RequestError("the form ends in the middle.", mend="Send it again.", code="invalid_form")
        if not form.upload.filename:
            raise RequestError("the form has no file.", param="file", mend="Add a part called `file`.")
        return await run_in_threadpool(form.finish)
    except FormParserError as error:
        form.discard()
        raise RequestError(
            f"the form is malformed: {error}.", mend="Send it again.", code="invalid_form"
        ) from None
    except BaseException:
        form.discard()
        raise


def clean_filename(name: str) -> str:
    """The last part of a path, without control characters; only ever shown, never opened."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in last if c.isprintable())[:255] or "file"


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(
        f"the file is larger than {limit} bytes.",
        param="file",
        mend="Split it, or have the operator register it by path.",
        code="file_too_large",
    )
