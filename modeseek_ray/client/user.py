"""`Client`: files, jobs, events and models, for people and the command line."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from modeseek_ray.client.answers import Json, raise_for, unreachable
from modeseek_ray.config import JobConfig
from modeseek_ray.errors import ServiceError

DEFAULT_URL = "http://127.0.0.1:8420"
FILE_ROLES = ("training_file", "validation_file", "retention_file", "replay_file")
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_STREAM_SILENCE_S = 45.0  # the service sends a sign of life every 15 s
_PASSING = (
    "unreachable",
    "unavailable",
    "idempotency_key_in_flight",
    "rate_limited",
    "too_many_open_requests",
)
_NOT_YET = ("model_starting", "engines_busy", "engine_full", "engine_lost")
_RECONNECT_S = (0.2, 0.5, 1.0, 2.0, 5.0)


class Client:
    """Talks to a service. A context manager; `MODESEEK_URL` and `MODESEEK_API_KEY` are the defaults."""

    def __init__(self, base_url: str | None = None, api_key: str | None = None) -> None:
        self.base_url = (base_url or os.environ.get("MODESEEK_URL") or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get("MODESEEK_API_KEY")
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Files.

    def upload(self, path: Path, purpose: str = "fine-tune") -> Json:
        """Send a file. Returns the file object; `id` is what jobs refer to."""
        with path.open("rb") as file:
            return self._json(
                "POST", "/v1/files", files={"file": (path.name, file)}, data={"purpose": purpose}
            )

    def register(self, path: Path, purpose: str = "fine-tune") -> Json:
        """Name a file that the service can already see, under one of its allowed roots."""
        return self._json("POST", "/v1/files", json={"path": str(path), "purpose": purpose})

    def files(self) -> list[Json]:
        return list(self._pages("/v1/files"))

    def delete_file(self, file_id: str) -> Json:
        return self._json("DELETE", f"/v1/files/{file_id}")

    def content(self, file_id: str) -> bytes:
        return self._request("GET", f"/v1/files/{file_id}/content").content

    def download(self, file_id: str, target: Path) -> Path:
        """Save a file's contents, streaming."""
        return self._save(f"/v1/files/{file_id}/content", target)

    def download_results(self, job_id: str, directory: Path) -> list[Path]:
        """Save all result files of a job under their own names."""
        directory.mkdir(parents=True, exist_ok=True)
        saved = []
        for file_id in self.job(job_id)["result_files"]:
            name = self._json("GET", f"/v1/files/{file_id}")["filename"]
            saved.append(self.download(file_id, directory / Path(name).name))
        return saved

    # Jobs.

    def submit(
        self,
        config: JobConfig | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        patience_s: float = 10.0,
    ) -> Json:
        """Create a job whose files are ids. Repeated after a lost answer; the key keeps it one job."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        deadline = time.monotonic() + patience_s
        failures = 0
        while True:
            try:
                return self._json("POST", "/v1/fine_tuning/jobs", json=_body(config), headers=headers)
            except ServiceError as error:
                if error.code not in _PASSING or time.monotonic() > deadline:
                    raise
            _pause(failures)
            failures += 1

    def submit_files(self, config: JobConfig, base: Path = Path()) -> Json:
        """Upload the job's files, which are paths relative to `base`, and create the job."""
        return self.submit(self.uploaded(config, base))

    def uploaded(self, config: JobConfig, base: Path = Path()) -> JobConfig:
        """The same job with its files uploaded and named by id. A path named twice is sent once."""
        sent: dict[Path, str] = {}
        names: dict[str, str] = {}
        for role in FILE_ROLES:
            name = getattr(config, role)
            if name is None or name.startswith("file-"):
                continue
            path = (base / name).resolve()
            if not path.is_file():
                raise ServiceError(
                    f"there is no file {path}.", param=role, mend="Mend the path.", http_status=400
                )
            if path not in sent:
                sent[path] = self.upload(path)["id"]
            names[role] = sent[path]
        return config.model_copy(update=names)

    def validate(self, config: JobConfig | Mapping[str, Any]) -> Json:
        """Everything a submission checks, nothing started: `valid`, `error`, `report`."""
        return self._json("POST", "/v1/fine_tuning/jobs/validate", json=_body(config), timeout=900.0)

    def look(
        self, config: JobConfig | Mapping[str, Any], *, presets: Sequence[str] = (), rows: int | None = None
    ) -> Json:
        """Start a validation that also scores rows under the start; ask `validation` for its result.

        `presets` are shown beside the job's own weighting, at most `rows` rows are scored (0 = all).
        What is wrong already is said at once, as `validate` says it.
        """
        params: dict[str, Any] = {"score": "true", "preset": list(presets)}
        if rows is not None:
            params["rows"] = rows
        return self._json("POST", "/v1/fine_tuning/jobs/validate", json=_body(config), params=params)

    def validation(self, validation_id: str) -> Json:
        """A validation with scores: `status`, and `result` once that is `finished`."""
        return self._json("GET", f"/v1/fine_tuning/validations/{validation_id}")

    def job(self, job_id: str) -> Json:
        return self._json("GET", f"/v1/fine_tuning/jobs/{job_id}")

    def jobs(self, limit: int = 20, metadata: Mapping[str, str] | None = None) -> list[Json]:
        """The newest jobs."""
        query: dict[str, Any] = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        found: list[Json] = []
        for job in self._pages("/v1/fine_tuning/jobs", {**query, "limit": min(limit, 100)}):
            found.append(job)
            if len(found) == limit:
                break
        return found

    def cancel(self, job_id: str) -> Json:
        return self._json("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")

    def pause(self, job_id: str) -> Json:
        """Ask for a pause; the job's status is `paused` once its workers are gone."""
        return self._json("POST", f"/v1/fine_tuning/jobs/{job_id}/pause")

    def resume(self, job_id: str, *, trainers: int | None = None) -> Json:
        """Let a paused or failed job go on; with another number of `trainers` (below ZeRO-3) not exactly."""
        body = {} if trainers is None else {"json": {"resources": {"trainers": trainers}}}
        return self._json("POST", f"/v1/fine_tuning/jobs/{job_id}/resume", **body)

    def logs(self, job_id: str, attempt: int | None = None) -> str:
        """What the driver of an attempt printed; of the newest, where none is named."""
        query = {} if attempt is None else {"attempt": attempt}
        return self._request("GET", f"/v1/fine_tuning/jobs/{job_id}/logs", params=query).text

    def checkpoints(self, job_id: str) -> list[Json]:
        return list(self._pages(f"/v1/fine_tuning/jobs/{job_id}/checkpoints"))

    def events(self, job_id: str) -> list[Json]:
        """All events so far, oldest first."""
        return list(self._pages(f"/v1/fine_tuning/jobs/{job_id}/events", {"limit": 100}))[::-1]

    def stream(self, job_id: str, after: str | None = None, *, patience_s: float = 120.0) -> Iterator[Json]:
        """Events as they happen until the job has ended, from the one after `after` on (default: the first).

        A broken connection is taken up where it broke, without a gap or a repetition. Raises
        `ServiceError` when the service stays away for `patience_s`.
        """
        away_since: float | None = None
        failures = 0
        while True:
            try:
                for event in self._stream_once(job_id, after):
                    away_since, failures = None, 0
                    if event is None:
                        return
                    if event:
                        after = event["id"]
                        yield event
            except (httpx.TransportError, ServiceError) as error:
                if isinstance(error, ServiceError) and error.http_status < 500:
                    raise
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > patience_s:
                    raise unreachable(self.base_url, error) from error
            _pause(failures)
            failures += 1

    def wait(self, job_id: str, *, timeout_s: float = math.inf, poll_s: float = 1.0) -> Json:
        """Poll until the job has ended. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["status"] not in TERMINAL:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job_id} is still {job['status']} after {timeout_s:.0f} s")
            time.sleep(poll_s)
        return job

    def weights(self, job_id: str, *, after: int = 0, limit: int = 100) -> Json:
        """A page of the per-sample ledger as JSON rows."""
        query = {"format": "json", "after": after, "limit": limit}
        return self._json("GET", f"/v1/fine_tuning/jobs/{job_id}/weights", params=query)

    def ledger(self, job_id: str, *, after: int = 0, limit: int = 100) -> Json:
        """What each row got in all, with texts, and which rows to collect more of or to sample less."""
        query = {"format": "json", "view": "ledger", "after": after, "limit": limit}
        return self._json("GET", f"/v1/fine_tuning/jobs/{job_id}/weights", params=query)

    def download_weights(self, job_id: str, target: Path) -> Path:
        """The whole per-sample ledger as Parquet."""
        return self._save(f"/v1/fine_tuning/jobs/{job_id}/weights", target)

    def report(self, job_id: str) -> str:
        """The job's HTML report."""
        return self._request("GET", f"/v1/fine_tuning/jobs/{job_id}/report").text

    # Answers.

    def ask(
        self,
        model: str,
        question: str | Sequence[Mapping[str, Any]],
        *,
        patience_s: float = 600.0,
        **options: Any,
    ) -> Json:
        """An answer object, OpenAI's: of a chat for messages, of a completion for a text.

        `options` are the request's other fields (`n`, `best_of`, `grader`, `item`, `max_tokens`, …). While
        the model is being loaded it is asked again, for `patience_s` at most.
        """
        is_text = isinstance(question, str)
        path = "/v1/completions" if is_text else "/v1/chat/completions"
        body = {"model": model, "prompt" if is_text else "messages": question, **options}
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self._json("POST", path, json=body, timeout=patience_s)
            except ServiceError as error:
                if error.code not in _NOT_YET or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    # Models and the service itself.

    def models(self) -> list[Json]:
        return list(self._pages("/v1/models"))

    def model(self, name: str) -> Json:
        return self._json("GET", f"/v1/models/{quote(name, safe='')}")

    def delete_model(self, name: str) -> Json:
        return self._json("DELETE", f"/v1/models/{quote(name, safe='')}")

    def is_ready(self) -> bool:
        """Whether the service answers and can do its work."""
        with suppress(ServiceError):
            return self._request("GET", "/readyz", timeout=2.0).status_code == 200
        return False

    # How.

    def _stream_once(self, job_id: str, after: str | None) -> Iterator[Json | None]:
        """One connection's events; empty ones are signs of life, None says that there will be no more."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        path = f"/v1/fine_tuning/jobs/{job_id}/events"
        timeout = httpx.Timeout(_STREAM_SILENCE_S, connect=5.0)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise_for(response)
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    yield None
                elif line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))
                elif line.startswith((":", "retry:")):
                    yield {}

    def _pages(self, path: str, query: Mapping[str, Any] | None = None) -> Iterator[Json]:
        parameters = dict(query or {})
        while True:
            page = self._json("GET", path, params=parameters)
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            parameters["after"] = page["data"][-1]["id"]

    def _json(self, method: str, path: str, **request: Any) -> Json:
        answer: Json = self._request(method, path, **request).json()
        return answer

    def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise unreachable(self.base_url, error) from error
        raise_for(response)
        return response

    def _save(self, path: str, target: Path) -> Path:
        draft = target.with_name(f".{target.name}.part")
        try:
            with self._http.stream("GET", path) as response, draft.open("wb") as file:
                if response.is_error:
                    response.read()
                    raise_for(response)
                for chunk in response.iter_bytes():
                    file.write(chunk)
            draft.replace(target)
        except httpx.TransportError as error:
            raise unreachable(self.base_url, error) from error
        finally:
            draft.unlink(missing_ok=True)
        return target


def _pause(failures: int) -> None:
    """Wait a little longer after each failure in a row."""
    time.sleep(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])


def _body(config: JobConfig | Mapping[str, Any]) -> Json:
    if isinstance(config, JobConfig):
        return config.model_dump(mode="json", exclude_unset=True)
    return dict(config)
