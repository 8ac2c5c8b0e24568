"""`modeseek check --score` on a real model: tables, one JSON object, a page; the second look is cached."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from actors.cli.outlook import bars, show_look
from actors.commands.check import LookOptions, check
from actors.commands.outlook import Look, draw, look
from actors.commands.validate import validate
from modeseek_ray.config import parse_config, read_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.look import LookRequest
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.weights.outlook import RATIOS_ARE_ONE


@pytest.fixture
def job_file(tiny_dense: Path, tmp_path: Path) -> Path:
    """Twenty rows of two sources; those of `long` are sixteen times as long."""
    rows = [
        {"prompt": f"say {i}", "completion": "x" * (3 if i % 2 else 48), "task": "short" if i % 2 else "long"}
        for i in range(20)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "model": str(tiny_dense),
        "training_file": "train.jsonl",
        "method": {"type": "weighted", "weighted": {"preset": "mode_seeking", "training": {"batch_size": 4}}},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


def seen_by(job_file: Path, cache: Path, **options: Any) -> Look:
    config = read_config(job_file)
    return look(config, job_file.parent / "train.jsonl", Path(config.model), cache, **options)


def test_one_json_object_with_the_plan_and_every_preset(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    home = Home(tmp_path / "home")
    options = LookOptions(score=True, presets=("flow", "rwr"), rows=0, html=page)
    assert check(job_file, home, options, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"data", "plan", "warnings", "outlook"} == answer.keys()
    outlook = answer["outlook"]
    assert (outlook["num_rows"], outlook["num_rows_file"]) == (20, 20)
    assert [seen["name"] for seen in outlook["outlooks"]] == ["this job", "flow"]
    assert [each["name"] for each in outlook["impossible"]] == ["rwr"]
    assert outlook["outlooks"][0]["notes"][0] == RATIOS_ARE_ONE
    assert {part["label"] for part in outlook["outlooks"][1]["by_source"]} == {"short", "long"}
    text = page.read_text()
    assert text.count("<svg") == 6  # histogram, sources and lengths of two weightings
    assert "<script" not in text and "rewards_N" in text


def test_a_preset_these_rows_cannot_be_weighed_by_is_named_and_the_others_shown(
    job_file: Path, tmp_path: Path
) -> None:
    """`bon` wants two rewarded answers of each prompt; the last one here has one."""
    rows = [{"prompt": p, "completion": c, "group": p, "reward": i} for p in "ab" for i, c in enumerate("xy")]
    rows.append({"prompt": "c", "completion": "x", "group": "c", "reward": 1})
    (job_file.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = seen_by(job_file, tmp_path, presets=("bon", "flow"))
    assert [each.name for each in seen.outlooks] == ["this job", "flow"]
    assert [(each["name"], each["error"]["code"]) for each in seen.impossible] == [("bon", "numerics")]
    assert "one has 1" in seen.impossible[0]["error"]["message"]


ONLINE = {
    "type": "online",
    "online": {
        "preset": "grpo",
        "grader": {
            "type": "string_check",
            "operation": "eq",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.reference }}",
        },
        "rollout": {"max_tokens": 4},
    },
}
BEST_OF_N = {"type": "best_of_n", "best_of_n": {k: ONLINE["online"][k] for k in ("grader", "rollout")}}  # type: ignore[index]


@pytest.mark.parametrize("method", [ONLINE, BEST_OF_N])
def test_a_job_that_writes_its_samples_is_valid_and_told_that_there_is_nothing_to_score(
    method: dict[str, Any], job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts with a reference are no demonstrations: read as such, they made the job look invalid."""
    rows = [{"prompt": f"say {c}", "reference": c} for c in "abcdefgh"]
    (job_file.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job_file.write_text(json.dumps({**json.loads(job_file.read_text()), "method": method}))
    home = Home(tmp_path / "home")
    assert check(job_file, home, LookOptions(score=True), as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "outlook" not in answer
    (told,) = [w for w in answer["warnings"] if w["code"] == "nothing_to_score"]
    assert "rollouts.parquet" in told["message"] and told["param"] == "training_file"

    config = read_config(job_file)
    files = {"training_file": job_file.parent / "train.jsonl"}
    JobSpec("val-1", config, files, Path(config.model)).write(home.config("val-1"))
    LookRequest().write(home.look("val-1"))
    assert validate("val-1", home.storage, score=True) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["ok"] and outcome["error"] is None
    assert [w["code"] for w in outcome["report"]["warnings"]].count("nothing_to_score") == 1


def test_the_second_look_reads_the_scores_back(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = seen_by(job_file, tmp_path, rows=8)
    monkeypatch.setattr("actors.scoring.ReferenceModel", None)  # a second scoring would call it
    assert seen_by(job_file, tmp_path, rows=8) == first
    assert (first.num_rows, first.num_rows_file) == (8, 20)
    assert [seen.name for seen in first.outlooks] == ["this job", "sft", "flow", "anchored", "mode_seeking"]


def test_a_sample_keeps_prompts_whole_and_follows_the_seed() -> None:
    group_N = np.repeat(np.arange(10), 3)
    chosen_N = draw(group_N, 10, seed=3)
    assert len(chosen_N) == 9 and (np.diff(chosen_N) > 0).all()
    assert set(np.bincount(group_N[chosen_N]).tolist()) == {0, 3}
    assert draw(group_N, 10, seed=3).tolist() == chosen_N.tolist()
    assert draw(group_N, 10, seed=4).tolist() != chosen_N.tolist()
    assert len(draw(group_N, 1, seed=0)) == 3


def test_the_tables_fit_a_terminal(job_file: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(show_look(seen_by(job_file, tmp_path, presets=("flow", "mode_seeking"))))
    text = console.export_text()
    flat = " ".join(text.split())
    for piece in ("ESS/n", "starved", "dominant", "mode_seeking", "mean weight by source", "short", "long"):
        assert piece in text
    assert re.search(r"^ mode_seeking +1 +0 noise ", text, re.MULTILINE)
    assert RATIOS_ARE_ONE in flat
    assert bars([0, 0, 0]) == "···"


def test_an_unknown_preset_is_named_before_anything_is_scored(job_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no preset 'mode_seking'.*mode_seeking"):
        seen_by(job_file, tmp_path, presets=("mode_seking",))


def test_the_samplers_log_probabilities_come_from_the_behaviour_model(
    job_file: Path, tiny_dense: Path, tmp_path: Path
) -> None:
    """The start as its own sampler: pi_0 / mu is one on every row, so all weights are equal."""
    config = parse_config(
        {
            **json.loads(job_file.read_text()),
            "method": {
                "type": "weighted",
                "weighted": {"likelihood": {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.5}},
            },
        }
    )
    training = job_file.parent / "train.jsonl"
    with_model = look(config, training, tiny_dense, tmp_path, behavior_model=tiny_dense, presets=("sft",))
    assert with_model.outlooks[0].ess_ratio == pytest.approx(1.0)
    without = look(config, training, tiny_dense, tmp_path, presets=("sft",))
    assert [each["name"] for each in without.impossible] == ["this job"]
