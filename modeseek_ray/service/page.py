"""The web page at `/`, the API's documentation at `/docs`, and the plain files of both.

There is no build step, and nothing comes from elsewhere.

What it shows comes from the same API as everybody else's, with the key of whoever looks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType

from fastapi import APIRouter, Request
from fastapi.responses import Response

from modeseek_ray.jobs.errors import NotFoundError

router = APIRouter(include_in_schema=False)

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

# Scripts and styles from here alone, no inline ones, no markup made from strings, no framing.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)


@dataclass(frozen=True)
class Asset:
    """A file as it goes over the wire; `tag` names its content."""

    content: bytes
    media_type: str
    tag: str


@cache
def assets() -> Mapping[str, Asset]:
    """Every file of the page by its path. Read once: what is not in here is not served."""
    found: dict[str, Asset] = {}
    _collect(files("modeseek_ray.service").joinpath("web"), "", found)
    return MappingProxyType(found)


@router.get("/")
def page(request: Request) -> Response:
    """The page itself; it holds no data, so it needs no key."""
    return _answer(request, assets()["index.html"])


@router.get("/docs")
def documentation(request: Request) -> Response:
    """Every operation of `/openapi.json`, shown by the same kind of plain files."""
    return _answer(request, assets()["docs.html"])


@router.get("/web/{path:path}")
def asset(path: str, request: Request) -> Response:
    """A script, a style or a picture of the page."""
    known = assets().get(path)
    if known is None:
        raise NotFoundError(
            f"the page has no file {path[:128]!r}.", code="unknown_url", mend="Open / instead."
        )
    return _answer(request, known)


def _answer(request: Request, asset: Asset) -> Response:
    """Browsers ask each time and get the bytes only where they changed, so an upgrade is seen at once."""
    headers = {
        "Content-Security-Policy": POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": asset.tag,
    }
    if asset.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


def _collect(directory: Traversable, prefix: str, found: dict[str, Asset]) -> None:
    for entry in directory.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            _collect(entry, f"{name}/", found)
        elif (media_type := _MEDIA_TYPES.get(f".{entry.name.rpartition('.')[2]}")) is not None:
            content = entry.read_bytes()
            found[name] = Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
