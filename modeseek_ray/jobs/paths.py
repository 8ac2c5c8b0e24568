"""Where things lie under `MODESEEK_HOME` and `MODESEEK_STORAGE`. Nobody else puts paths together."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modeseek_ray.errors import StorageError

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def _checked(identifier: str) -> str:
    if not _ID.fullmatch(identifier):
        raise ValueError(f"{identifier!r} is not an id: it becomes part of a path")
    return identifier


@dataclass(frozen=True)
class Home:
    """The directory that holds all state of one installation, and the one that all Ray nodes see.

    Data files, jobs (checkpoints, results, models) and the cache lie in `storage`, which several nodes
    share; the store, the service's lock and Ray's record stay in `root`, on a local disk. On one machine
    they are the same directory. A driver is given `storage` alone.

    >>> Home(Path("/var/lib/modeseek")).secret("ftjob-1", 2).as_posix()
    '/var/lib/modeseek/jobs/ftjob-1/attempts/2/secret.json'
    """

    root: Path
    shared: Path | None = None

    @classmethod
    def at(cls, root: Path) -> Home:
        """`root`, and the storage that `MODESEEK_STORAGE` names."""
        shared = os.environ.get("MODESEEK_STORAGE")
        return cls(root.expanduser().resolve(), Path(shared).expanduser().resolve() if shared else None)

    @classmethod
    def from_environment(cls) -> Home:
        """`MODESEEK_HOME`, or `~/.modeseek`; and `MODESEEK_STORAGE`."""
        return cls.at(Path(os.environ.get("MODESEEK_HOME") or Path.home() / ".modeseek"))

    @property
    def storage(self) -> Path:
        """What every Ray node has to see, at this path."""
        return self.shared or self.root

    @property
    def store_url(self) -> str:
        """`MODESEEK_STORE_URL` (it holds a password: never a command line), or SQLite in here."""
        return os.environ.get("MODESEEK_STORE_URL") or f"sqlite:///{self.root / 'store.sqlite3'}"

    @property
    def endpoints(self) -> Path:
        """The operator's list of judges that graders may ask (`rewards/endpoints.py`); need not exist."""
        return self.storage / "grader-endpoints.yaml"

    @property
    def files(self) -> Path:
        return self.storage / "files"

    @property
    def jobs(self) -> Path:
        return self.storage / "jobs"

    @property
    def lock(self) -> Path:
        """Held by the one service process that writes here."""
        return self.root / "service.lock"

    @property
    def operator(self) -> Path:
        """How `modeseek keys` reaches the service that runs here: url and token. Mode 0600."""
        return self.root / "operator.json"

    @property
    def cache(self) -> Path:
        """What can be computed again: reference scores, playground models."""
        return self.storage / "cache"

    @property
    def engines(self) -> Path:
        """Of inference engines: a directory each, with the secret of the living ones."""
        return self.storage / "engines"

    def engine_secret(self, engine_id: str) -> Path:
        """What an inference engine needs to know: model, url, token. Mode 0600."""
        return self.engines / _checked(engine_id) / "secret.json"

    def engine_model(self, engine_id: str) -> Path:
        """A checkpoint written out as a model; goes with its engine."""
        return self.engines / _checked(engine_id) / "model"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def file(self, file_id: str) -> Path:
        return self.files / _checked(file_id)

    def job(self, job_id: str) -> Path:
        return self.jobs / _checked(job_id)

    def config(self, job_id: str) -> Path:
        """The job as accepted, with every name resolved to a path: a `JobSpec`."""
        return self.job(job_id) / "config.json"

    def attempt(self, job_id: str, attempt: int) -> Path:
        return self.job(job_id) / "attempts" / str(int(attempt))

    def secret(self, job_id: str, attempt: int) -> Path:
        """What a driver needs to speak to the service: token, fence, url. Mode 0600."""
        return self.attempt(job_id, attempt) / "secret.json"

    def spool(self, job_id: str, attempt: int) -> Path:
        """Events of a driver, each written down before it is sent."""
        return self.attempt(job_id, attempt) / "spool.jsonl"

    def checkpoints(self, job_id: str) -> Path:
        return self.job(job_id) / "checkpoints"

    def results(self, job_id: str) -> Path:
        return self.job(job_id) / "results"

    def metrics_csv(self, job_id: str) -> Path:
        return self.results(job_id) / "metrics.csv"

    def weights_parquet(self, job_id: str) -> Path:
        return self.results(job_id) / "weights.parquet"

    def report_html(self, job_id: str) -> Path:
        return self.results(job_id) / "report.html"

    def look(self, validation_id: str) -> Path:
        """Which weightings a validation with scores is to show, on how many rows: a `LookRequest`."""
        return self.job(validation_id) / "look.json"

    def validation(self, validation_id: str) -> Path:
        """State and outcome of a validation with scores."""
        return self.job(validation_id) / "validation.json"

    def outlook_html(self, validation_id: str) -> Path:
        """Its page with plots."""
        return self.job(validation_id) / "outlook.html"

    def model(self, job_id: str) -> Path:
        """The exported Hugging Face directory."""
        return self.job(job_id) / "model"

    def prepare(self) -> None:
        """Create the directories. Raises `StorageError` where that is not possible."""
        for directory in (self.root, self.storage, self.files, self.jobs, self.cache, self.logs):
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                variable = "MODESEEK_HOME" if directory.is_relative_to(self.root) else "MODESEEK_STORAGE"
                raise StorageError(
                    f"cannot be created: {error.strerror}.",
                    file=str(directory),
                    mend=f"Point {variable} at a directory you may write to.",
                ) from None


def allowed_path(path: Path, roots: Sequence[Path], home: Home) -> Path | None:
    """Where an absolute `path` leads when every link is followed, if users may name that; else None.

    A root does not open the installation's own directory, with all tenants' files and the store, unless
    the root itself lies inside it: an operator may well allow `/data` and keep the home under it.
    """
    resolved = path.resolve()
    allowed = [root.expanduser().resolve() for root in roots]
    for own in (home.root.resolve(), home.storage.resolve()):
        if resolved.is_relative_to(own):
            allowed = [root for root in allowed if root != own and root.is_relative_to(own)]
    return resolved if any(resolved.is_relative_to(root) for root in allowed) else None


def write_private(path: Path, text: str) -> None:
    """Replace `path` by `text`, readable by its owner alone; whole or not at all, and on disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename or a new entry in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
