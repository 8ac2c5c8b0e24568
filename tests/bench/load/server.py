"""The service under load, in a process of its own: everything real but the cluster, which is idle.

python -m tests.bench.load.server HOME ROOT PORT JOBS_AT_A_TIME
"""

from __future__ import annotations

import sys
from pathlib import Path

from modeseek_ray.jobs.launcher import Capacity, LaunchStatus, ValidationOutcome
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.store import Store
from modeseek_ray.service import ServiceSettings, create_app
from modeseek_ray.service.serve import listen, make_server


class IdleCluster:
    """Starts nothing: the load speaks for the drivers, with the secrets that the service wrote."""

    async def launch(self, job_id: str, attempt: int, secret_path: Path) -> str:
        return f"{job_id}-{attempt}"

    async def stop(self, submission_id: str) -> None: ...

    async def status(self, submission_id: str) -> LaunchStatus:
        return "running"

    async def capacity(self) -> Capacity | None:
        return None

    async def logs(self, submission_id: str) -> str | None:
        return None


class NoDoubts:
    """Validation is a process per job; here the API is measured."""

    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        return ValidationOutcome(True)


def main() -> None:
    directory, root, port, slots = sys.argv[1:]
    home = Home(Path(directory))
    home.prepare()
    store = Store(home.store_url)
    reconciler = Reconciler(
        store,
        home,
        IdleCluster(),
        NoDoubts(),
        url=f"http://127.0.0.1:{port}",
        settings=ReconcilerSettings(max_running_jobs=int(slots), max_validations=8),
    )
    app = create_app(
        home,
        store,
        reconciler=reconciler,
        validator=NoDoubts(),
        settings=ServiceSettings(roots=(Path(root),)),
    )
    with listen("127.0.0.1", int(port)) as listener:
        make_server(app, port=int(port)).run(sockets=[listener])
    store.close()


if __name__ == "__main__":
    main()
