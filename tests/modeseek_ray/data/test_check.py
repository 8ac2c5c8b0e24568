"""The report of a file and of a job: figures by hand, and what the configuration asks of the data."""

from __future__ import annotations

import json

import pytest

from modeseek_ray.config import parse_config
from modeseek_ray.data.check import inspect_file, inspect_job
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError
from tests.modeseek_ray.data.chat_models import CHATML, build_tokenizer, write_model


@pytest.fixture(scope="module")
def bytewise_dir(tmp_path_factory):
    """One token per ASCII character; 64 positions."""
    return write_model(tmp_path_factory.mktemp("bytewise"), CHATML, build_tokenizer(merges=False))


def row(completion="de", **more):
    return {"prompt": "abc", "completion": completion, **more}


def job(weighting=None, **training):
    method = {"type": "weighted", "weighted": {**(weighting or {}), "training": training}}
    return parse_config({"model": "m", "training_file": "f", "method": method})


def test_figures_by_hand(write_jsonl, bytewise_dir):
    path = write_jsonl(
        row(group="g", reward=0.5, logprobs=[-1, -1, -1], weight=0.5),  # 3 + 2 + 1 tokens
        row(group="g", reward=-1),
        row("x" * 10, group="h", task="long"),  # 3 + 10 + 1 tokens, cut to 12
        row(),
    )
    report = inspect_file(path, ChatTokenizer(bytewise_dir), max_length=12, truncate=True)
    assert not report.problems
    found = report.to_dict()
    assert found == json.loads(json.dumps(found))
    expected = {
        "rows": 4, "groups": 3, "group_sizes": {"1": 2, "2": 1}, "has_rewards": True, "rows_with_reward": 2,
        "has_logprobs": False, "rows_with_logprobs": 1, "tasks": {"long": 1}, "samples": 4,
        "tokens": 6 + 6 + 12 + 6, "trained_tokens": 3 + 3 + 9 + 3, "longest": 12, "truncated": 1,
        "length_histogram": {"8": 3, "16": 1}, "problems": [],
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert (report.largest_group, report.smallest_reward, report.largest_reward) == (2, -1, 0.5)
    assert (report.smallest_rewarded_group, report.prior_sum) == (2, 3.5)


def test_the_smallest_rewarded_group_leaves_out_prompts_without_a_reward(write_jsonl):
    def fewest(*rows):
        return inspect_file(write_jsonl(*rows)).smallest_rewarded_group

    pairs = [row(group=g, reward=r) for g in "abc" for r in (0, 1)]
    assert fewest(*pairs, row(group="d"), row()) == 2
    assert fewest(*pairs, row(group="d", reward=1), row(group="d")) == 1
    assert fewest(*pairs, row(reward=1)) == 1  # a prompt of its own
    assert fewest(row()) is None


def test_what_needs_no_tokenizer_is_checked_without_one(write_jsonl):
    report = inspect_file(write_jsonl(row(reward=2e6), row(), row(id=1), row(id=1)))
    assert (report.rows, report.tokens) == (2, 0)
    assert report.problems.counts == {"bad_reward": 1, "duplicate_id": 1}


def test_accepted_answers_count_as_samples_not_rows(write_jsonl, bytewise_dir):
    path = write_jsonl(row(accept=["f"]), row())
    report = inspect_file(path, ChatTokenizer(bytewise_dir), role="retention")
    assert (report.rows, report.graded_rows, report.samples) == (2, 1, 3)


def test_a_job_is_checked_file_by_file_and_the_first_problem_raised(write_jsonl, bytewise_dir):
    files = {
        "training_file": write_jsonl(row(), row("x" * 70), name="train.jsonl"),
        "validation_file": write_jsonl(row(), row(accept=[1]), row(), b"{", name="valid.jsonl"),
    }
    report = inspect_job(job(), files, bytewise_dir, names={"validation_file": "file-123"})
    assert not report.ok
    with pytest.raises(DataError) as refused:
        report.raise_if_bad()
    assert refused.value.line == 2 and "train.jsonl:2: has 74 tokens, but at most 64" in str(refused.value)
    assert "of 3 problems in all" in str(refused.value)
    valid = report.to_dict()["files"]["validation"]
    assert [(p["file"], p["line"], p["kind"]) for p in valid["problems"]] == [
        ("file-123", 2, "wrong_type"),
        ("file-123", 4, "malformed_json"),
    ]
    assert valid["role"] == "validation"


def test_the_shorter_of_model_and_job_limits_lengths(write_jsonl, bytewise_dir):
    files = {"training_file": write_jsonl(row("x" * 20))}
    assert inspect_job(job(), files, bytewise_dir).ok
    assert not inspect_job(job(max_length=23), files, bytewise_dir).ok
    report = inspect_job(job(max_length=23, truncate=True), files, bytewise_dir)
    assert report.ok and report.training.truncated == 1
    assert [w.code for w in report.warnings] == ["truncated"]
    assert inspect_job(job(max_length=1000), files, bytewise_dir).training.max_length == 64


def test_a_sound_job_raises_nothing(write_jsonl, bytewise_dir):
    report = inspect_job(job(), {"training": write_jsonl(row(), row())}, bytewise_dir)
    report.raise_if_bad()
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert report.ok and report.warnings == ()


EXPONENTIAL = {"reward": {"scheme": "exponential", "beta": 1.0}}
OVER_DATA = {"likelihood": {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.5}}


@pytest.mark.parametrize(
    ("weighting", "training", "rows", "kind"),
    [
        ({}, {}, [row(weight=0), row(weight=0)], "bad_weight"),
        ({}, {"batch_size": 2}, [row(group=1)] * 3, "group_too_large"),
    ],
)
def test_what_the_method_needs_and_the_data_has_not(write_jsonl, weighting, training, rows, kind):
    report = inspect_job(job(weighting, **training), {"training_file": write_jsonl(*rows)})
    assert report.training.problems.counts == {kind: 1}
    with pytest.raises(DataError):
        report.raise_if_bad()


@pytest.mark.parametrize(
    ("weighting", "rows", "codes"),
    [
        (EXPONENTIAL, [row(reward=1), row(reward=2)], []),
        (EXPONENTIAL, [row(reward=1), row(reward=2), row()], ["some_without_reward"]),
        (EXPONENTIAL, [row(reward=1), row(reward=1)], ["equal_rewards"]),
        ({}, [row(reward=1), row(reward=1)], []),
        (OVER_DATA, [row(logprobs=-3), row(logprobs=[-1, -1, -1])], []),
    ],
)
def test_what_is_odd_but_can_be_trained_on_is_said(write_jsonl, weighting, rows, codes):
    report = inspect_job(job(weighting), {"training_file": write_jsonl(*rows)})
    assert report.ok
    assert [w.code for w in report.warnings] == codes


@pytest.mark.parametrize(
    ("told", "codes"), [({}, ["only_losses"]), ({"accept": []}, []), ({"task": "t"}, ["only_losses"])]
)
def test_held_out_rows_that_cannot_be_right_or_wrong_are_said(write_jsonl, told, codes):
    files = {
        "training_file": write_jsonl(row()),
        "validation_file": write_jsonl(row(**told), name="held.jsonl"),
    }
    warnings = inspect_job(job(), files).warnings
    assert [(w.code, w.param) for w in warnings] == [(code, "validation_file") for code in codes]
    assert all("held.jsonl" in w.message and "`accept: []`" in w.message for w in warnings)


def test_a_behavior_model_stands_in_for_logged_log_probabilities(write_jsonl):
    config = job(OVER_DATA).model_copy(update={"behavior_model": "sft"})
    assert inspect_job(config, {"training_file": write_jsonl(row())}).ok


def test_length_buckets_hold_their_upper_bound(write_jsonl, bytewise_dir):
    # 3 + n + 1 tokens: 8, 9 and 16
    path = write_jsonl(row("x" * 4), row("x" * 5), row("x" * 12))
    assert inspect_file(path, ChatTokenizer(bytewise_dir)).length_histogram == {8: 1, 16: 2}
