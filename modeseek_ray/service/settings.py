"""What the operator decides about the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServiceSettings:
    """Limits in bytes and seconds; `roots` are the directories under which paths may be named."""

    roots: tuple[Path, ...] = ()
    max_upload_bytes: int = 4 * 2**30
    max_body_bytes: int = 2**20  # of a JSON body sent by a user
    max_driver_body_bytes: int = 32 * 2**20  # of a batch of events sent by a driver
    max_checked_bytes: int = 4 * 2**20  # data files up to this size are read before a job is answered
    sse_keepalive_s: float = 15.0
    requests_per_minute: int | None = None  # of one tenant, where its own limit is not set; None = any number
    max_open_requests: int = 1024  # of one tenant at a time, event streams included
    webhook_networks: tuple[str, ...] = ()  # private networks that webhooks may be sent to, as 10.0.0.0/8
