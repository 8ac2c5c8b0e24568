"""`/v1/files`: upload, register, list, read, delete."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import ValidationError

from modeseek_ray.config import config_error
from modeseek_ray.jobs.errors import NotFoundError, QuotaError
from modeseek_ray.jobs.paths import allowed_path
from modeseek_ray.jobs.records import FileRecord, new_id
from modeseek_ray.service.body import read_json
from modeseek_ray.service.context import Caller, CallerDep, Service, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.service.upload import Upload, receive_upload
from modeseek_ray.service.wire import Deleted, FileObject, Page, Registration, file_object

router = APIRouter(prefix="/v1/files", tags=["files"], responses=ERROR_RESPONSES)

_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            },
            "application/json": {"schema": Registration.model_json_schema()},
        },
    }
}


@router.post("", openapi_extra=_CREATE_BODY)
async def create_file(request: Request, service: ServiceDep, caller: CallerDep) -> FileObject:
    """Upload a file as a form, or register one by its path with a JSON body."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _upload(request, service, caller)
    body = await read_json(request, service.settings.max_body_bytes)
    try:
        registration = Registration.model_validate(body)
    except ValidationError as error:
        raise config_error(error) from None
    return await run_in_threadpool(_register, service, caller, registration)


@router.get("")
def list_files(
    service: ServiceDep,
    caller: CallerDep,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """List files, newest first unless asked otherwise."""
    page = service.store.files.page(
        tenant_id=caller.tenant_id, purpose=purpose, after=after, limit=limit, order=order
    )
    data = [file_object(record) for record in page.data]
    return Page(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/{file_id}")
def retrieve_file(file_id: str, service: ServiceDep, caller: CallerDep) -> FileObject:
    """What is known of a file."""
    return file_object(service.store.files.get(file_id, caller.tenant_id))


@router.get("/{file_id}/content", response_class=FileResponse)
def file_content(file_id: str, service: ServiceDep, caller: CallerDep) -> FileResponse:
    """The file itself."""
    record = service.store.files.get(file_id, caller.tenant_id)
    check_readable(service, record)
    if not Path(record.path).is_file():
        raise NotFoundError(
            f"the contents of {file_id} are gone.", code="file_not_found", mend="Upload the file again."
        )
    return FileResponse(record.path, filename=record.filename, media_type="application/octet-stream")


@router.delete("/{file_id}")
def delete_file(file_id: str, service: ServiceDep, caller: CallerDep) -> Deleted:
    """Delete a file. One that a living job reads is kept."""
    service.store.files.get(file_id, caller.tenant_id)
    naming = service.store.jobs.living_that_name(file_id)
    job = next((job for job in naming if file_id in job.file_ids), None)
    if job is not None:
        raise RequestError(
            f"job {job.id} still reads this file.",
            mend="Cancel the job, or wait for its end.",
            code="file_in_use",
        )
    record = service.store.files.delete(file_id, caller.tenant_id)
    if record.owned:
        Path(record.path).unlink(missing_ok=True)
    return Deleted(id=file_id, object="file")


def check_readable(service: Service, record: FileRecord, param: str | None = None) -> None:
    """Raises `RequestError` where a registered path now leads elsewhere, or its root is not allowed any more.

    Whoever can write below a root can put a link there after the registration.
    """
    path = Path(record.path)
    if not record.owned and allowed_path(path, service.settings.roots, service.home) != path:
        raise RequestError(
            "the registered path does not lead to a file under an allowed root any more.",
            param=param,
            mend="Register the file again.",
            code="path_not_allowed",
        )


async def _upload(request: Request, service: Service, caller: Caller) -> FileObject:
    file_id = new_id("file")
    draft = service.home.files / f".{file_id}.upload"
    limit, over = await run_in_threadpool(_allowance, service, caller)
    upload = await receive_upload(request, draft, limit, over)
    try:
        return await run_in_threadpool(_store_upload, service, caller, file_id, upload)
    finally:
        draft.unlink(missing_ok=True)


def _store_upload(service: Service, caller: Caller, file_id: str, upload: Upload) -> FileObject:
    """The bytes get their final name before the row exists: a crash between leaves a file nobody knows."""
    purpose = upload.fields.get("purpose")
    if purpose != "fine-tune":
        raise RequestError(
            f"the purpose is {'missing' if purpose is None else repr(purpose[:64])}.",
            param="purpose",
            mend='Files for jobs have the purpose "fine-tune".',
            code="invalid_purpose",
        )
    if upload.num_bytes == 0:
        raise RequestError(
            "the file is empty.", param="file", mend="Send a file with rows.", code="empty_file"
        )
    target = service.home.file(file_id)
    upload.keep_as(target)
    try:
        record = service.store.files.add(
            file_id,
            upload.filename,
            purpose,
            target,
            num_bytes=upload.num_bytes,
            owned=True,
            sha256=upload.sha256,
            tenant_id=caller.tenant_id,
        )
    except QuotaError:  # others have uploaded meanwhile
        target.unlink(missing_ok=True)
        raise
    return file_object(record)


def _allowance(service: Service, caller: Caller) -> tuple[int, QuotaError | None]:
    """How many bytes the caller may send now, and what to say of more where its quota is what binds."""
    room = service.store.files.allowance(caller.tenant_id)
    limit = service.settings.max_upload_bytes
    if room is None or room >= limit:
        return limit, None
    return room, QuotaError(f"your quota has room for {room} bytes.", mend="Delete some files first.")


def _register(service: Service, caller: Caller, registration: Registration) -> FileObject:
    """Links are followed before the comparison with the roots, so that none leads out."""
    given, roots = Path(registration.path), service.settings.roots
    path = allowed_path(given, roots, service.home) if given.is_absolute() else None
    if path is None:
        raise RequestError(
            "the path is not under an allowed root.",
            param="path",
            mend=f"Allowed: {', '.join(map(str, roots)) or 'none; start the service with --root DIRECTORY'}.",
            code="path_not_allowed",
        )
    try:
        # No link that was put there since, and no waiting for somebody to write into a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if stat.S_ISREG(status.st_mode) else ""
    except OSError as error:
        raise RequestError(
            f"the file cannot be read: {error.strerror}.",
            param="path",
            mend="Mend the path.",
            code="file_not_found",
        ) from None
    if not sha256 or status.st_size == 0:
        raise RequestError(
            "this is not a file with rows.", param="path", mend="Name a file.", code="empty_file"
        )
    record = service.store.files.add(
        new_id("file"),
        path.name,
        registration.purpose,
        path,
        num_bytes=status.st_size,
        owned=False,
        sha256=sha256,
        tenant_id=caller.tenant_id,
    )
    return file_object(record)
