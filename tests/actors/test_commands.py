"""The `modeseek` command as a person types it, on a small random model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from actors import main
from actors.commands.preflight import local_model
from modeseek_ray.errors import ConfigError, DataError, ModelError, ModeseekError
from modeseek_ray.jobs.paths import Home
from modeseek_ray.weights import PRESETS

COMMANDS = (
    "serve submit follow ask list show logs cancel pause resume check run rerank report doctor playground presets"
    " keys tenants demo"
).split()


def _modeseek(*arguments: str | Path) -> Result:
    """Run a command in this process. Errors of ours are raised, as the entry point would print them."""
    result = CliRunner().invoke(main.app, [str(a) for a in arguments])
    if isinstance(result.exception, ModeseekError):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def job_file(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job beside its data, which it names by relative paths."""
    directory = tmp_path_factory.mktemp("job")
    rows = [{"prompt": f"say {c}", "completion": c * 3} for c in "abcdefgh"]
    (directory / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    training = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01}
    job = {
        "model": str(tiny_dense),
        "training_file": "train.jsonl",
        "method": {"type": "supervised", "supervised": {"training": training}},
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _changed(job_file: Path, name: str, **changes: object) -> Path:
    path = job_file.with_name(name)
    path.write_text(yaml.safe_dump({**yaml.safe_load(job_file.read_text()), **changes}))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = _modeseek(command, "--help")
    assert result.exit_code == 0
    assert len(result.output) > 200


def test_a_person_may_name_models_inside_the_home_by_their_directories(
    tiny_dense: Path, tmp_path: Path
) -> None:
    """What jobs and the playground made; nothing else that lies there."""
    for inside in ("playground/mine", "jobs/job/model", "files/stolen"):
        shutil.copytree(tiny_dense, tmp_path / inside)
    for inside in ("playground/mine", "jobs/job/model"):
        assert local_model(str(tmp_path / inside), Home(tmp_path)) == tmp_path / inside
    with pytest.raises(ModelError, match="not under an allowed root"):
        local_model(str(tmp_path / "files/stolen"), Home(tmp_path))


def test_check_prints_data_and_plan_and_starts_nothing(job_file: Path, tmp_path: Path) -> None:
    result = _modeseek("check", job_file, "--home", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"rows\s+8", result.output)
    assert re.search(r"1 × trainer", result.output)
    assert f"modeseek submit {job_file} --follow" in result.output
    assert list(tmp_path.iterdir()) == []


def test_check_shows_all_problems_of_a_file_and_names_the_first(job_file: Path, tmp_path: Path) -> None:
    bad = job_file.with_name("bad.jsonl")
    bad.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "b", "complettion": "c"}\n')
    with pytest.raises(DataError) as refused:
        _modeseek("check", _changed(job_file, "bad.yaml", training_file="bad.jsonl"), "--home", tmp_path)
    assert (refused.value.line, refused.value.code) == (1, "empty_completion")


def test_a_misspelt_field_is_named_by_its_path(job_file: Path, tmp_path: Path) -> None:
    wrong = _changed(job_file, "wrong.yaml", resources={"trainer": 2})
    with pytest.raises(ConfigError) as refused:
        _modeseek("check", wrong, "--home", tmp_path)
    assert refused.value.param == "resources.trainer"


def test_run_local_trains_reports_and_can_be_repeated(job_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _modeseek("run", job_file, "--local", "--out", out, "--home", tmp_path)
    assert first.exit_code == 0, first.output
    record = json.loads((out / "results" / "job.json").read_text())
    # Finished already: nothing is trained again, and the export has the same bits.
    assert _modeseek("run", job_file, "--local", "--out", out, "--home", tmp_path).exit_code == 0
    again = json.loads((out / "results" / "job.json").read_text())
    assert again["weights_sha256"] == record["weights_sha256"]
    page = tmp_path / "page.html"
    assert _modeseek("report", out, "--out", page, "--home", tmp_path).exit_code == 0
    assert "<html" in page.read_text()
    both = tmp_path / "both.html"
    compared = _modeseek("report", out, out, "--out", both, "--home", tmp_path)
    assert compared.exit_code == 0
    assert compared.stdout == f"{both}\n" and "New task learnt, old tasks kept" in compared.stderr
    assert both.read_text() != page.read_text()


def test_presets_are_listed_and_printed(tmp_path: Path) -> None:
    listed = _modeseek("presets").output
    assert all(name in listed for name in PRESETS)
    assert (
        yaml.safe_load(_modeseek("presets", "anchored").output)["likelihood"]["of"] == "initial_over_policy"
    )
    assert _modeseek("presets", "show", "anchored").output == _modeseek("presets", "anchored").output
    for wrong in (["anchord"], ["show", "anchord"], ["anchored", "flow"]):
        assert _modeseek("presets", *wrong).exit_code == 2


def test_keys_are_shown_once_and_can_be_revoked(tmp_path: Path) -> None:
    created = CliRunner().invoke(main.app, ["keys", "create", "alice", "--home", str(tmp_path)])
    key = created.stdout.strip()
    assert re.fullmatch(r"msk_[0-9a-f]{16}_[0-9a-f]{64}", key)
    key_id = key.split("_")[1]
    listed = _modeseek("keys", "list", "--home", tmp_path).output
    assert key_id in listed and key not in listed
    _modeseek("keys", "revoke", key_id, "--home", tmp_path)
    from modeseek_ray.jobs.paths import Home
    from modeseek_ray.jobs.store import Store

    store = Store(Home(tmp_path).store_url)
    assert store.keys.verify(key) is None
    store.close()
