"""How often, and how much at a time, one tenant may ask. Kept in this process: each service counts its own."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock

from modeseek_ray.errors import ModeseekError

_CACHE_S = 5.0  # a changed limit is seen after that


class LimitError(ModeseekError):
    """Too many requests; `retry_after_s` says when to try again."""

    code = "rate_limited"
    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float, code: str | None = None) -> None:
        super().__init__(message, mend=f"Try again in {math.ceil(retry_after_s)} s.", code=code)
        self.retry_after_s = retry_after_s


class Limits:
    """A bucket of requests per tenant that fills evenly, and a count of those that are open.

    A bucket holds a minute's worth: who was silent may send that many at once.
    """

    def __init__(
        self,
        per_minute_of: Callable[[str], int | None],
        max_open: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute_of = per_minute_of
        self._max_open = max_open
        self._clock = clock
        self._lock = Lock()
        self._open: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant: requests left, as of when
        self._known: dict[str, tuple[int | None, float]] = {}  # tenant: its limit, good until

    def enter(self, tenant_id: str) -> Callable[[], None]:
        """Count a request. Returns what to call when it has ended. Raises `LimitError`."""
        per_minute = self._per_minute(tenant_id)
        with self._lock:
            if self._open[tenant_id] >= self._max_open:
                raise LimitError(
                    f"{self._max_open} requests are open already.",
                    retry_after_s=1.0,
                    code="too_many_open_requests",
                )
            if per_minute is not None:
                self._draw(tenant_id, per_minute)
            self._open[tenant_id] += 1
        return lambda: self._leave(tenant_id)

    def _draw(self, tenant_id: str, per_minute: int) -> None:
        now = self._clock()
        left, since = self._buckets.get(tenant_id, (float(per_minute), now))
        left = min(per_minute, left + (now - since) * per_minute / 60)
        if left < 1:
            wait_s = (1 - left) * 60 / per_minute if per_minute else 60.0
            raise LimitError(f"more than {per_minute} requests a minute.", retry_after_s=wait_s)
        self._buckets[tenant_id] = (left - 1, now)

    def _leave(self, tenant_id: str) -> None:
        with self._lock:
            self._open[tenant_id] -= 1
            if not self._open[tenant_id]:
                del self._open[tenant_id]

    def _per_minute(self, tenant_id: str) -> int | None:
        """Not one question to the store per request."""
        per_minute, good_until = self._known.get(tenant_id, (None, -math.inf))
        now = self._clock()
        if now >= good_until:
            per_minute = self._per_minute_of(tenant_id)
            self._known[tenant_id] = (per_minute, now + _CACHE_S)
        return per_minute
