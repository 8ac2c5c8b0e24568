"""The validation process: tokenizers and models are looked at away from the API."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from modeseek_ray.jobs.launcher import ValidationOutcome
from modeseek_ray.jobs.paths import Home

_ERROR_TAIL = 2_000  # characters of a crashed process's stderr that are worth showing


class ProcessValidator:
    """Runs `<command> --job ID --home DIRECTORY [--score]` and reads one JSON object from its standard output.

    The object has `ok`, `error` (`code`, `message`, `param`; or null) and `report`. The process is
    killed with everything it holds when the time is up or the service stops.
    """

    def __init__(
        self,
        home: Home,
        command: Sequence[str] = (),
        *,
        timeout_s: float = 900.0,
        score_timeout_s: float = 6 * 3600.0,
    ) -> None:
        self._home = home
        self._command = tuple(command) or (sys.executable, "-m", "actors.main", "validate")
        self._timeout_s = timeout_s
        self._score_timeout_s = score_timeout_s

    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        timeout_s = self._score_timeout_s if score else self._timeout_s
        process = await asyncio.create_subprocess_exec(
            *self._command,
            "--job",
            job_id,
            "--home",
            str(self._home.storage),
            *(["--score"] if score else []),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            return _broken(f"took longer than {timeout_s:.0f} s", "")
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                await process.wait()
        return read_outcome(output, errors, process.returncode)


def read_outcome(output: bytes, errors: bytes, returncode: int | None) -> ValidationOutcome:
    """The last line of the output that is a JSON object with `ok`; libraries may have printed before it."""
    for line in reversed(output.decode(errors="replace").strip().splitlines()):
        with suppress(ValueError):
            data: Any = json.loads(line, parse_constant=lambda _: None)  # NaN could not be stored
            if isinstance(data, dict) and "ok" in data:
                return ValidationOutcome(bool(data["ok"]), data.get("error"), data.get("report") or {})
    return _broken(
        f"ended with status {returncode} and no result", errors.decode(errors="replace")[-_ERROR_TAIL:]
    )


def _broken(what: str, tail: str) -> ValidationOutcome:
    message = f"The validation process {what}. {tail}".strip()
    return ValidationOutcome(False, {"code": "validation_failed", "message": message, "param": None})
