"""`python -m modeseek_ray.service`: the API without a cluster. Jobs are accepted and wait for one."""

from __future__ import annotations

import argparse
from pathlib import Path

from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.store import Store
from modeseek_ray.service import ServiceSettings, create_app, run_service
from modeseek_ray.service.serve import check_exposure, only_service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="where state lives (default: MODESEEK_HOME or ~/.modeseek)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8420)
    parser.add_argument("--root", type=Path, action="append", default=[], help="directory of models and data")
    arguments = parser.parse_args()
    home = Home.at(arguments.home) if arguments.home else Home.from_environment()
    with only_service(home):
        store = Store(home.store_url)
        check_exposure(store, arguments.host)
        app = create_app(home, store, settings=ServiceSettings(roots=tuple(arguments.root)))
        run_service(app, arguments.host, arguments.port)


if __name__ == "__main__":
    main()
