"""Errors on the wire: OpenAI's body, a request id on every answer, and never a traceback."""

from __future__ import annotations

import errno
import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from modeseek_ray.errors import ModeseekError

log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What is wrong, where, and how to mend it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    mend: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be carried out as it is.",
        401: "No key, or one that is not ours.",
        403: "Not allowed.",
        404: "There is no such thing, or it is another tenant's.",
        413: "The body is larger than the limit.",
        409: "A request with the same Idempotency-Key is being worked on.",
        429: "Too many requests of this tenant; `Retry-After` says when to try again.",
        422: "A parameter of the query or path is malformed.",
        503: "The service cannot store anything at the moment; try again.",
    }.items()
}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_RETRY_AFTER_S = 2.0
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class RequestError(ModeseekError):
    """The request itself is malformed."""

    code = "invalid_request"
    http_status = 400


class TooLargeError(RequestError):
    """The body is over the limit."""

    code = "body_too_large"
    http_status = 413


def error_response(error: ModeseekError, status: int | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it. The place in a data file goes into the message."""
    status = status or error.http_status
    sentence = f"{error.file}:{error.line}: {error.message}" if error.file and error.line else error.message
    if error.file and not error.line:
        sentence = f"{error.file}: {error.message}"
    detail = ErrorDetail(
        message=f"{sentence} {error.mend}".rstrip(),
        type=_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        param=error.param,
        code=error.code,
        mend=error.mend or None,
    )
    # OpenAI's clients repeat 409 by themselves; of ours one is worth repeating.
    retry_after_s = getattr(error, "retry_after_s", _RETRY_AFTER_S if status == 503 else None)
    headers = {"x-should-retry": "false"} if status == 409 and retry_after_s is None else {}
    if status == 413:
        headers["Connection"] = "close"  # or the rest of the body would be read, to no end
    if retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    body = ErrorBody(error=detail).model_dump(mode="json")
    return JSONResponse(body, status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Turn every exception into an answer of the documented shape."""

    @app.exception_handler(ModeseekError)
    async def _known(_request: Request, error: ModeseekError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _parameters(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        problem = RequestError(f"{name}: {first['msg']}.", param=name or None, code="invalid_parameter")
        return error_response(problem, 422)

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        problem = RequestError(f"{error.detail}.", code=codes.get(error.status_code, "http_error"))
        response = error_response(problem, error.status_code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeoutError)
    async def _store(_request: Request, error: Exception) -> JSONResponse:
        log.error("the store failed: %s", error)
        problem = ModeseekError(
            "the store cannot be written or read at the moment.",
            mend="Nothing was changed; look at the disk's free space, and try again.",
            code="unavailable",
        )
        return error_response(problem, 503)

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> JSONResponse:
        request_id = getattr(request.state, "request_id", "")
        log.error("request %s failed", request_id, exc_info=error)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            response = error_response(
                ModeseekError(
                    f"the disk refused: {error.strerror}.",
                    mend="Nothing was changed; make space, and try again.",
                    code="storage",
                ),
                503,
            )
        else:
            mend = f"Report this with x-request-id {request_id}."
            response = error_response(ModeseekError("the service failed.", mend=mend), 500)
        response.headers["x-request-id"] = request_id  # this answer does not pass our middleware
        return response
