"""The validation process: its answer is read, and its death, its silence and its end are survived."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from modeseek_ray.config import parse_config
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.jobs.validation import ProcessValidator, read_outcome


def validator(home: Home, code: str, timeout_s: float = 60) -> ProcessValidator:
    return ProcessValidator(home, [sys.executable, "-c", code], timeout_s=timeout_s)


async def test_the_answer_is_the_last_line(home: Home) -> None:
    code = "import json, sys; print('loading {'); print(json.dumps({'ok': True, 'report': {'argv': sys.argv[1:]}}))"
    outcome = await validator(home, code).validate("ftjob-1")
    assert outcome.ok
    assert outcome.report == {"argv": ["--job", "ftjob-1", "--home", str(home.root)]}


async def test_a_crash_shows_its_last_words(home: Home) -> None:
    outcome = await validator(home, "raise SystemExit('out of cheese')").validate("ftjob-1")
    assert not outcome.ok
    assert outcome.error is not None
    assert outcome.error["code"] == "validation_failed"
    assert "out of cheese" in outcome.error["message"] and "status 1" in outcome.error["message"]


async def test_silence_ends_with_the_time_limit(home: Home) -> None:
    outcome = await validator(home, "import time; time.sleep(600)", timeout_s=0.5).validate("ftjob-1")
    assert outcome.error is not None and "longer than" in outcome.error["message"]


async def test_the_process_does_not_outlive_the_service(home: Home, tmp_path: Path) -> None:
    """Cancelled as at the service's end: the process and its children are gone."""
    pids = tmp_path / "pids"
    child = "import time; time.sleep(600)"
    code = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(pids) + '.tmp'!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids) + '.tmp'!r}, {str(pids)!r})\n"
        "child.wait()"
    )
    task = asyncio.create_task(validator(home, code).validate("ftjob-1"))
    while not pids.exists():
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline = time.monotonic() + 20
    while any(map(is_running, map(int, pids.read_text().split()))):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """A zombie that waits for a parent to notice has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_that_is_not_an_answer_is_taken_for_one() -> None:
    for output in (b"", b"\xff\xfe", b"[]", b"{}", b"1\n2", b'{"ok"'):
        assert not read_outcome(output, b"", 0).ok
    assert read_outcome(b'{"ok": true, "report": {"loss": NaN}}', b"", 0).report == {"loss": None}


def test_a_spec_survives_its_file(home: Home) -> None:
    config = {
        "model": "playground/moe",
        "training_file": "file-1",
        "method": {"type": "weighted", "weighted": {"training": {"epochs": 2, "learning_rate": "auto"}}},
    }
    spec = JobSpec(
        job_id="ftjob-1",
        config=parse_config(config),
        files={"training_file": Path("/a")},
        model_path=Path("/m"),
        filenames={"training_file": "mine.jsonl"},
        checkpoint=Path("/c"),
    )
    path = home.config("ftjob-1")
    spec.write(path)
    assert JobSpec.read(path) == spec
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a\0", "x" * 200, "a b"])
def test_only_ids_become_paths(home: Home, name: str) -> None:
    for place in (home.job, home.file, home.config, home.model):
        with pytest.raises(ValueError, match="not an id"):
            place(name)
