"""One service, one small job per cell: break something at a named point, and look at what is left.

A cell holds when the job succeeds all the same, its weights are bit for bit those of the run without a
fault (online, where an engine was lost and wrote other bits: of a run that trains on the same samples),
every sample was trained as often as in that run, and `history.py` finds nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.network import free_port
from modeseek_ray.client import Client
from modeseek_ray.errors import ServiceError
from tests.e2e.conftest import RunningService
from tests.faults import history, jobs
from tests.faults.cells import Cell, Kind
from tests.faults.history import ClientLog, Trained
from tests.faults.volumes import MIB, Relief, Volumes
from tests.forks import HOOKS, ROOT, environ, zygote

LEASE_S = 12
# Long for a small job, short for who waits for a stopped one.
DEADLINES_S = {
    "setup": 120, "score": 60, "rollout": 30, "step": 12, "sync": 30, "checkpoint": 12, "export": 60
}  # fmt: skip
CELL_DEADLINE_S = 240
CANCEL_DEADLINE_S = 60
STORE_BYTES = 64 * MIB
CHECKPOINT_BYTES = 16 * MIB  # of a cell in which they fill their volume


@dataclass(frozen=True)
class Finding:
    """How a cell went. `problems` is empty where every promise was kept."""

    cell: Cell | None
    kind: Kind
    job_id: str
    seconds: float
    attempts: int
    redone_steps: int
    recovered_s: float | None  # from the fault to the next step, checkpoint or end
    weights_sha256: str
    trained: Trained
    replayed: bool = False  # compared with a run on the same samples
    problems: list[str] = field(default_factory=list)


class Laboratory:
    """`with Laboratory(directory, models) as laboratory:`, then `run` cell by cell, `final_problems` at last."""

    def __init__(
        self,
        directory: Path,
        models: Mapping[Kind, Path],
        prompts: Path | None = None,
        *,
        forks: bool = True,
    ) -> None:
        """`models` and data (`prompts` for online jobs) by kind of job. Without `forks` each process imports anew."""
        self._forks = forks
        self._directory = directory
        self._home = directory / "home"  # the store, on a volume of its own
        self._storage = directory / "storage"  # jobs and caches
        self._storage.mkdir(exist_ok=True)
        self._volumes = Volumes()
        self._models = models
        self._prompts = prompts
        self._plan = directory / "plan.json"
        self._plan.write_text("{}")
        self._port = free_port()
        self._service: RunningService | None = None
        self._files: dict[Kind, str] = {}
        self._calm: dict[Kind, Finding] = {}
        self._log = ClientLog()
        self._stack = ExitStack()

    def __enter__(self) -> Laboratory:
        try:
            self._open()
        except BaseException:
            self._stack.close()  # or a mounted volume would stay behind
            raise
        return self

    def _open(self) -> None:
        environment = {
            "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT)]),
            "MODESEEK_FAULT_PLAN": str(self._plan),
            "MODESEEK_FAULT_HOME": str(self._home),
            "MODESEEK_STORAGE": str(self._storage),
        }
        self._stack.callback(self._volumes.unmount)
        self._volumes.mount(self._home, STORE_BYTES)
        self._stack.enter_context(environ(environment))
        if self._forks:
            self._stack.enter_context(environ(self._stack.enter_context(zygote())))
        options = ["--lease", str(LEASE_S)]
        for section, seconds in DEADLINES_S.items():
            options += ["--deadline", f"{section}={seconds}"]
        for model in self._models.values():
            options += ["--root", str(model.parent)]
        self._service = RunningService(self._home, root=self._directory, port=self._port, options=options)
        self._service.__enter__()
        self._stack.callback(self._service.__exit__)
        with self._client() as client:
            for kind in self._models:
                self._files[kind] = client.upload(jobs.training_file(kind, self._directory, self._prompts))[
                    "id"
                ]

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, cell: Cell) -> Finding:
        """One job, with the fault of `cell`, compared with one without. A job that never ends is a finding too."""
        calm = self.calm(cell.kind)
        if calm.problems:
            return replace(calm, cell=cell, problems=["there is no run without a fault to compare with"])
        if cell.point.endswith((".score", ".block")):
            shutil.rmtree(self._storage / "cache" / "scores", ignore_errors=True)
        found = self._observe(cell, cell.kind)
        problems = found.problems
        if not Path(f"{self._plan}.fired").exists():
            problems.append("the fault never happened")
        replayed = found.weights_sha256 != calm.weights_sha256 and cell.kind == "online"
        if replayed:
            calm = self._observe(None, "online", rollouts_of=found.job_id)
        if found.weights_sha256 != calm.weights_sha256:
            problems.append("other weights than without the fault")
        if found.trained != calm.trained:
            problems.append("samples were trained another number of times than without the fault")
        return replace(found, replayed=replayed)

    def calm(self, kind: Kind) -> Finding:
        """The run without a fault, made once; once more where the first has failed."""
        if kind not in self._calm:
            found = self._observe(None, kind)
            self._calm[kind] = found if not found.problems else self._observe(None, kind)
        return self._calm[kind]

    def final_problems(self) -> list[str]:
        """What can be seen of all jobs at the end: none lost or doubled, none changed after its end."""
        self._revive()
        database = self._home / "store.sqlite3"
        problems = list(history.submission_problems(self._log, database))
        with self._client() as client:
            for job_id, ended in self._log.ended.items():
                if client.job(job_id) != ended:
                    problems.append(f"{job_id} changed after its end")
        return problems

    def _observe(self, cell: Cell | None, kind: Kind, rollouts_of: str | None = None) -> Finding:
        """One job to its end. Whatever goes wrong is said in the finding, and nothing of the job is left."""
        fired = Path(f"{self._plan}.fired")
        fired.unlink(missing_ok=True)
        self._plan.write_text("{}" if cell is None else cell.plan())
        started = time.monotonic()
        job_id = ""
        try:
            with self._client() as client:
                job_id = self._submit(client, kind)
                if rollouts_of is not None:  # before it can have started: validation takes longer
                    jobs_ = self._storage / "jobs"
                    shutil.copytree(jobs_ / rollouts_of / "rollouts", jobs_ / job_id / "rollouts")
                relief = self._relief(cell, job_id, fired)
                follower = threading.Thread(target=self._follow, args=(job_id,), daemon=True)
                follower.start()
                job = self._until_ended(client, job_id, relief)
                follower.join(60)
            seconds = time.monotonic() - started
            found = self._look(cell, kind, job, seconds, fired)
            return replace(found, problems=[*found.problems, *relief.problems()])
        except Exception as error:  # the table goes on
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            left = self._clear_away(job_id)
            seconds = time.monotonic() - started
            return Finding(cell, kind, job_id, seconds, 0, 0, None, "", Trained(), problems=[problem, *left])

    def _relief(self, cell: Cell | None, job_id: str, fired: Path) -> Relief:
        """The volume that the cell fills is there, and the plan knows where."""
        directory = self._home
        if cell is not None and cell.volume == "data":
            directory = self._storage / "jobs" / job_id / "checkpoints"
            self._volumes.mount(
                directory, CHECKPOINT_BYTES
            )  # its driver has not started: validation comes first
        if cell is not None and cell.volume is not None:
            self._plan.write_text(cell.plan(str(directory)))
        return Relief(cell, directory, fired, probe=self._directory / "probe.jsonl")

    def _look(
        self, cell: Cell | None, kind: Kind, job: dict[str, Any], seconds: float, fired: Path
    ) -> Finding:
        """What the history of an ended job says, by itself."""
        job_id = job["id"]
        self._log.ended[job_id] = job
        stored = history.read(self._home / "store.sqlite3", job_id)
        problems = list(history.job_problems(stored, self._log))
        problems += history.step_problems(stored, jobs.STEPS[kind], jobs.CHECKPOINT_EVERY[kind])
        if len(self._log.seen[job_id]) != len(stored.events):
            problems.append(f"the stream gave {len(self._log.seen[job_id])} of {len(stored.events)} events")
        if job["status"] != "succeeded":
            problems.append(f"the job ended as {job['status']}: {job.get('error')}")
        recovered_s = None
        if fired.exists():
            at = json.loads(fired.read_text())["at"]
            recovered_s = next(
                (e.created_at - at for e in stored.events if e.created_at > at and _is_progress(e)), None
            )
        results = self._storage / "jobs" / job_id / "results"
        steps = [step for _, step in stored.steps]
        return Finding(
            cell,
            kind,
            job_id,
            seconds,
            job["attempt"],
            len(steps) - len(set(steps)),
            recovered_s,
            _weights_sha256(results),
            history.trained(results) if job["status"] == "succeeded" else Trained(),
            problems=problems,
        )

    def _clear_away(self, job_id: str) -> list[str]:
        """Cancel the job, so that it neither takes the next one's workers nor meets its fault.

        Where that does not end it, the service and its Ray go, and new ones come.
        """
        self._plan.write_text("{}")
        deadline = time.monotonic() + CANCEL_DEADLINE_S
        while time.monotonic() < deadline:
            try:
                self._revive()
                with self._client() as client:
                    if not job_id or client.job(job_id)["status"] in history.ENDS:
                        return []
                    client.cancel(job_id)
            except (ServiceError, AssertionError):
                pass  # ended meanwhile, or the service is not there yet
            time.sleep(0.5)
        assert self._service is not None and self._service.process is not None
        try:
            self._service.__exit__()
        except subprocess.TimeoutExpired:
            self._service.process.kill()
        self._service.__enter__()
        return ["cancelling did not end it"]

    def _submit(self, client: Client, kind: Kind) -> str:
        """Until it is answered, with one key: the API may be what is broken."""
        key = f"cell-{len(self._log.answered)}"
        body = jobs.body(kind, self._models[kind], self._files[kind])
        deadline = time.monotonic() + CELL_DEADLINE_S
        while True:
            self._revive()
            try:
                job_id = str(client.submit(body, idempotency_key=key, patience_s=0)["id"])
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                self._log.answered[key] = job_id
                return job_id

    def _follow(self, job_id: str) -> None:
        """The stream of events, through every absence of the service."""
        seen = self._log.seen.setdefault(job_id, [])
        with self._client() as client:
            for event in client.stream(job_id):
                seen.append(event["id"])

    def _until_ended(self, client: Client, job_id: str, relief: Relief) -> dict[str, Any]:
        """Poll; start the service again when it was killed, and resume what paused for want of space."""
        deadline = time.monotonic() + CELL_DEADLINE_S
        job: dict[str, Any] = {}
        while time.monotonic() < deadline:
            self._revive()
            try:
                relief.of_store(client)
                job = client.job(job_id)
                relief.of_job(client, job)
                if job["status"] in ("succeeded", "failed", "cancelled"):
                    return job
            except ServiceError:
                pass
            time.sleep(0.1)
        was = {name: job.get(name) for name in ("state", "attempt", "progress", "error")}
        raise TimeoutError(f"{job_id} did not end within {CELL_DEADLINE_S} s: {was}")

    def _revive(self) -> None:
        assert self._service is not None and self._service.process is not None
        if self._service.process.poll() is not None:
            self._service.__enter__()

    def _client(self) -> Client:
        return Client(f"http://127.0.0.1:{self._port}")


def _weights_sha256(results: Path) -> str:
    """Empty where the attempt did not get as far as its record: set-up failed."""
    record = results / "job.json"
    return str(json.loads(record.read_text()).get("weights_sha256", "")) if record.is_file() else ""


def _is_progress(event: history.Event) -> bool:
    return "loss" in event.data or "step" in event.data or event.state in history.ENDS
