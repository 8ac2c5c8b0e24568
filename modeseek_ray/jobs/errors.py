"""What the store refuses."""

from __future__ import annotations

from modeseek_ray.errors import ModeseekError


class NotFoundError(ModeseekError):
    """No such job, file, model or key, or it belongs to another tenant."""

    code = "not_found"
    http_status = 404


class IllegalTransitionError(ModeseekError):
    """The state table has no such arrow."""

    code = "illegal_transition"
    http_status = 400


class ConflictError(ModeseekError):
    """Somebody else changed the job in between. Read it again and decide anew."""

    code = "version_conflict"
    http_status = 409


class StaleFenceError(ModeseekError):
    """A driver spoke for an attempt that is over. It must stop itself."""

    code = "stale_fence"
    http_status = 403


class TokenError(ModeseekError):
    """The key or token is not one of ours."""

    code = "invalid_api_key"
    http_status = 401


class QuotaError(ModeseekError):
    """The tenant keeps as much as it may."""

    code = "quota_exceeded"
    http_status = 413


class ScopeError(ModeseekError):
    """The key is good, but not for this."""

    code = "scope_missing"
    http_status = 403


class InFlightError(ModeseekError):
    """The same request is being worked on at this moment."""

    code = "idempotency_key_in_flight"
    http_status = 409
    retry_after_s = 1.0


class IdempotencyError(ModeseekError):
    """One Idempotency-Key, two different bodies."""

    code = "idempotency_key_reused"
    http_status = 400
