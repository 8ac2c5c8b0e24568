"""Files of questions: what is read, what is refused, and what graders get to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.data.check import inspect_job
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.prompts import load_prompts, parse_prompt
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import ConfigError, DataError

GRADER = {
    "type": "string_check",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def job(training_file: Path, **online: Any) -> JobConfig:
    block = {"preset": "grpo", "grader": GRADER, **online}
    return parse_config(
        {"model": "m", "training_file": str(training_file), "method": {"type": "online", "online": block}}
    )


def test_questions_end_where_the_answer_begins(tiny_dense: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tiny_dense)
    chat = {"messages": [{"role": "user", "content": "hi"}], "answer": "ho", "task": "greet"}
    first, second = load_prompts(
        write(tmp_path / "p.jsonl", chat, {"prompt": "2+2="}), tokenizer, max_tokens=None
    )
    assert tokenizer.decode(first.token_ids_T) == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.decode(second.token_ids_T) == "2+2="
    assert first.reference == {"answer": "ho", "task": "greet"} and (first.ordinal, second.ordinal) == (0, 1)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "mixed_shapes"),
        ({"answer": "a"}, "missing_field"),
        ({"prompt": "a", "completion": "b"}, "unknown_field"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "wrong_type"),
        ({"messages": []}, "wrong_type"),
        ({"prompt": "a", "weight": -1}, "bad_weight"),
    ],
)
def test_what_is_no_question_is_refused(row: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_prompt(0, row)
    assert caught.value.code == code


def test_a_question_leaves_room_for_the_answer(tiny_dense: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "abc"}, {"prompt": "abcdef"})
    with pytest.raises(DataError, match=r"p\.jsonl:2: the question has 6 tokens; .* there are 5"):
        load_prompts(path, ChatTokenizer(tiny_dense), max_tokens=5)


def test_a_field_no_row_has_is_refused_before_anything_starts(tiny_dense: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "reference": "b"})
    with pytest.raises(ConfigError, match="no row has a field 'answer'") as caught:
        inspect_job(job(path, rollout={"max_tokens": 16}), {"training_file": path}, tiny_dense)
    assert caught.value.param == "method.online.grader.reference"


def test_the_report_counts_questions(tiny_dense: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "ab", "answer": "c"}, {"prompt": "x" * 250, "answer": "c"})
    report = inspect_job(job(path, rollout={"max_tokens": 16}), {"training_file": path}, tiny_dense)
    assert report.training.rows == 1 and report.training.tokens == 2
    assert dict(report.training.problems.counts) == {"too_long": 1}
    assert [w.code for w in report.warnings] == ["few_prompts"]


def test_recorded_samples_are_not_tokenised_again(tiny_dense: Path, tmp_path: Path) -> None:
    row = {"token_ids": [9, 8, 7, 6], "prompt_tokens": 2, "logprobs": [-0.5, -1.0], "reward": 1}
    (sample,) = load_samples(write(tmp_path / "r.jsonl", row), ChatTokenizer(tiny_dense), max_length=None)
    assert sample.token_ids_T.tolist() == [9, 8, 7, 6] and sample.trained_T.tolist() == [0, 0, 1, 1]
    assert sample.log_behavior == -1.5
    np.testing.assert_array_equal(sample.log_behavior_T, np.array([0, 0, -0.5, -1.0], dtype=np.float32))


@pytest.mark.parametrize(
    "row",
    [
        {"token_ids": [1, 2], "prompt_tokens": 2},
        {"token_ids": [1, "2"], "prompt_tokens": 1},
        {"token_ids": [1, 2], "prompt_tokens": True},
        {"token_ids": [1, -2], "prompt_tokens": 1},
        {"token_ids": [1, 2]},
    ],
)
def test_broken_records_of_samples_are_refused(row: dict[str, Any], tiny_dense: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_samples(write(tmp_path / "r.jsonl", row), ChatTokenizer(tiny_dense), max_length=None)
