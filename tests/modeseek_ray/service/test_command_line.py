"""`modeseek submit` and `follow` against a real service: what scripts get, and what a person is told to do next."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from actors import main
from actors.commands.ask import _model
from modeseek_ray.errors import ConfigError
from tests.modeseek_ray.service.conftest import ROWS, wait_for


@pytest.fixture
def job_file(service: Any, tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"model": str(service.model), "training_file": "rows.jsonl"}))
    return path


def modeseek(*arguments: Any) -> Result:
    return CliRunner().invoke(main.app, [str(each) for each in arguments])


def newest(service: Any, *, but: str | None) -> str:
    """The job that comes after `but`."""

    def found() -> str | None:
        with service.client() as client:
            jobs = client.jobs(limit=1)
        return jobs[0]["id"] if jobs and jobs[0]["id"] != but else None

    wait_for(found)
    return str(found())


def test_stdout_of_submit_is_the_id_alone_and_the_rest_says_what_to_do_next(
    service: Any, job_file: Path
) -> None:
    done = modeseek("submit", job_file, "--url", service.url)
    job_id = done.stdout.strip()
    assert done.exit_code == 0 and service.store.jobs.get(job_id)
    assert f"{service.url}/#/jobs/{job_id}" in done.stderr
    assert f"modeseek follow {job_id}" in done.stderr
    service.finish(job_id)
    followed = modeseek("follow", job_id, "--url", service.url)
    assert followed.exit_code == 0
    model = service.store.jobs.get(job_id).fine_tuned_model
    assert f"modeseek ask {model} " in followed.output and f"modeseek report {job_id}" in followed.output


def test_submit_and_follow_fails_where_the_job_does(service: Any, job_file: Path) -> None:
    with service.client() as client:
        before = next(iter(client.jobs(limit=1)), {}).get("id")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(modeseek, "submit", job_file, "--follow", "--url", service.url)
        with service.client() as client:
            client.cancel(newest(service, but=before))
        done = work.result(timeout=60)
    assert done.exit_code == 1 and "cancelled" in done.output


def test_a_job_is_asked_by_its_id_once_it_has_a_model(service: Any, job_file: Path) -> None:
    job_id = modeseek("submit", job_file, "--url", service.url).stdout.strip()
    with service.client() as client:
        with pytest.raises(ConfigError, match="has no model"):
            _model(client, job_id)
        service.finish(job_id)
        assert _model(client, job_id) == client.job(job_id)["fine_tuned_model"]
        assert _model(client, "playground/moe") == "playground/moe"
