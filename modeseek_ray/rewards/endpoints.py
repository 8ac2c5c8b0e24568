"""Which judges a job may talk to: endpoints the operator lists, and nothing else.

The operator's file, `grader-endpoints.yaml` in the service's home:

    endpoints:
      - url: https://judge.example/v1        # and everything below it
        api_key_file: /etc/modeseek/judge    # mode 0600; sent as a bearer token, never logged
        models: [judge-large]                # jobs may name these without a base_url
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator

from modeseek_ray.errors import ConfigError
from modeseek_ray.rewards.parameters import ScoreModel
from modeseek_ray.strict import Strict, error_path

_PORTS = {"http": 80, "https": 443}


class Endpoint(Strict):
    """One OpenAI-compatible API, and how much may be asked of it."""

    url: str = Field(min_length=1, max_length=2000)
    """Root of the API, to which `/chat/completions` is added; a job's `base_url` may also lie below it."""
    api_key_file: str | None = None
    """File with the key, readable by its owner alone."""
    models: list[str] = Field(default_factory=list, max_length=100)
    """Models a job may name without saying where they are."""
    max_concurrency: int = Field(16, ge=1, le=1024)
    """Requests under way at once, per grader."""
    timeout_s: float = Field(120.0, gt=0, le=3600)
    """Longest time for one answer, in seconds; then it is asked again."""
    attempts: int = Field(4, ge=1, le=20)
    """How often a sample is sent before it is given up."""
    first_wait_s: float = Field(1.0, ge=0, le=60)
    """Pause after the first failure, in seconds; doubled after each further one, up to 30."""

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        _parts(url)
        return url

    def allows(self, base_url: str) -> bool:
        """Same scheme, host and port, and the same path or one below it. `ValueError` for an odd URL."""
        *ours, root = _parts(self.url)
        *theirs, path = _parts(base_url)
        return ours == theirs and (path == root or path.startswith(f"{root}/"))

    def api_key(self) -> str | None:
        """Read anew for each round, so that it can be exchanged. Raises `ConfigError` if others may read it."""
        if self.api_key_file is None:
            return None
        path = Path(self.api_key_file)
        try:
            mode = path.stat().st_mode
            key = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the key of {self.url} cannot be read: {type(error).__name__}.",
                file=str(path),
                mend="The operator has to mend the file, or the list of endpoints.",
            ) from None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError(
                f"the key of {self.url} can be read by others.", file=str(path), mend="chmod 600 it."
            )
        return key


def _parts(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port, path without a final slash. Refuses what two parsers may read differently."""
    if not url.isascii() or any(c.isspace() or c in '\\%@?#"<>^`{|}' or ord(c) < 32 for c in url):
        raise ValueError(f"{url!r} is not a plain URL of scheme, host, port and path")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not a URL that starts with https:// or http://")
    if any(segment in (".", "..") for segment in parts.path.split("/")) or "//" in parts.path:
        raise ValueError(f"{url!r} must have a path without '.', '..' and empty parts")
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme], parts.path.rstrip("/")


def read_endpoints(path: Path) -> tuple[Endpoint, ...]:
    """The operator's list; none where there is no such file. Raises `ConfigError` with the file and the field."""
    if not path.exists():
        return ()
    try:
        found = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"cannot be read: {error}.", file=str(path), mend="Write `endpoints:` and a list of `url:`."
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"{first['msg'].removeprefix('Value error, ')}.",
            file=str(path),
            param=error_path(first["loc"]),
            mend="modeseek_ray/rewards/README.md has an example.",
        ) from None
    return tuple(found.endpoints)


class _File(Strict):
    endpoints: list[Endpoint]


def endpoint_of(section: ScoreModel, endpoints: Sequence[Endpoint], *, param: str) -> Endpoint | None:
    """Where the judge is: an endpoint whose `url` is the section's `base_url`, or None for a local classifier.

    Raises `ConfigError` at `param` if the operator does not allow the `base_url`.
    """
    if section.base_url is None:
        known = [e for e in endpoints if section.model in e.models]
        return known[0] if known and section.label is None else None  # labels are a classifier's
    try:
        allowed = next((e for e in endpoints if e.allows(section.base_url)), None)
    except ValueError as error:
        raise ConfigError(f"{error}.", param=f"{param}.base_url", mend="Give the root of the API.") from None
    if allowed is None:
        raise ConfigError(
            f"{section.base_url!r} is not among the endpoints that the operator allows.",
            param=f"{param}.base_url",
            mend=f"Allowed: {', '.join(e.url for e in endpoints) or 'none'}; or give a local classifier.",
        )
    return allowed.model_copy(update={"url": section.base_url.rstrip("/")})
