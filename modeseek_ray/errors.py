"""What can go wrong, in the user's words.

Every error a user can cause carries a stable `code`, the place it was found (`param`, or file and
line) and a sentence on how to mend it. The service turns it into OpenAI's error body, the command
line prints it, and the README's table of errors explains each code.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any


class ModeseekError(Exception):
    """Base of all errors shown to users.

    `message` says what is wrong, `mend` what to do about it, `param` names the field by its path
    (`method.weighted.likelihood.gamma.ess.floor`), `file` and `line` (counted from 1) the place in
    the user's data.
    """

    code = "internal_error"
    http_status = 500

    def __init__(
        self,
        message: str,
        *,
        mend: str = "",
        param: str | None = None,
        file: str | None = None,
        line: int | None = None,
        code: str | None = None,
    ) -> None:
        self.message = message
        self.mend = mend
        self.param = param
        self.file = file
        self.line = line
        if code is not None:
            self.code = code
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; the default would rebuild them from the printed sentence.
        return _rebuild, (type(self), dict(vars(self)), self.args)

    def to_dict(self) -> dict[str, str | int | None]:
        """For a job's record and its report: everything but the traceback."""
        names = ("code", "message", "mend", "param", "file", "line")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        place = "" if self.file is None else self.file
        if self.line is not None:
            place += f":{self.line}"
        where = place or self.param or ""
        sentence = f"{where}: {self.message}" if where else self.message
        return f"{sentence} {self.mend}".rstrip()


def _rebuild(cls: type[ModeseekError], attributes: dict[str, Any], args: tuple[Any, ...]) -> ModeseekError:
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class ConfigError(ModeseekError):
    """A field of the job is missing, misspelt, out of range, or contradicts another field."""

    code = "invalid_config"
    http_status = 400


class DataError(ModeseekError):
    """A data file cannot be trained on as it is."""

    code = "invalid_data"
    http_status = 400


class ModelError(ModeseekError):
    """A model is not there, not allowed, or not usable (no chat template, not safetensors, …)."""

    code = "invalid_model"
    http_status = 400


class NumericsError(ModeseekError):
    """A number that must be finite or equal is not: the job stops rather than train on it."""

    code = "numerics"


class RoutingError(ModeseekError):
    """Expert routes that do not fit the model, or that a forward pass did not take."""

    code = "routing"


class WorkerError(ModeseekError):
    """A worker process failed or could not be started."""

    code = "worker_failed"


class StorageError(ModeseekError):
    """Disk full, a checkpoint that does not verify, a directory that cannot be written."""

    code = "storage"


_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that the disk, a quota or a file's limit is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if isinstance(error, ModeseekError) and error.code == "disk_full":
            return True
        error = error.__cause__
    return False


# How PyTorch and Ray put it: their classes are not loaded here, and the CPU's allocator has none of its own.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "running low on memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that the memory of a machine or a GPU is used up.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if any(words in str(error) for words in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


def out_of_memory(what: str, error: BaseException) -> WorkerError:
    """`what` needed more memory than there was. Another attempt may have more: the job goes on from its checkpoint."""
    return WorkerError(
        f"{what}: out of memory: {error}",
        mend="Lower resources.micro_batch_tokens, raise zero_stage or set gradient_checkpointing; or find it more"
        " memory (`modeseek check` says how much each process needs).",
        code="out_of_memory",
    )


def cannot_write(what: str, path: object, error: OSError, *, kept: str) -> StorageError:
    """`what` cannot be written to `path`; `kept` says what is untouched. Code `disk_full` or `storage`."""
    return StorageError(
        f"{what} cannot be written: {error.strerror or error}.",
        file=str(path),
        mend=f"Free some space or mend the permissions; {kept} untouched.",
        code="disk_full" if is_full(error) else None,
    )


class ServiceError(ModeseekError):
    """The service answered with an error, or did not answer. `http_status` is what it said."""

    code = "service_error"

    def __init__(self, message: str, *, http_status: int = 500, **places: str | int | None) -> None:
        super().__init__(message, **places)  # type: ignore[arg-type]
        self.http_status = http_status


@dataclass(frozen=True)
class Warn:
    """Something the user should see that does not stop the job: same fields as an error."""

    code: str
    message: str
    param: str | None = None
