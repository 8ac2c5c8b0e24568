"""Preference rows: two samples of one group, masks on the outputs alone, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from modeseek_ray.config import parse_config
from modeseek_ray.data.check import inspect_job
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.rows import parse_row
from modeseek_ray.data.weighting import refuse_impossible_weighting
from modeseek_ray.errors import ConfigError, DataError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import plan


def pair(**changes: Any) -> dict[str, Any]:
    return {
        "input": {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": "2+2"},
            ]
        },
        "preferred_output": [{"role": "assistant", "content": "4"}],
        "non_preferred_output": [{"role": "assistant", "content": "five"}],
        **changes,
    }


def test_a_row_is_two_samples_of_one_group(write_jsonl, model_tokenizer):
    path = write_jsonl(pair(weight=2), pair(task="sums"))
    samples = load_samples(path, model_tokenizer, max_length=None)
    assert [s.row for s in samples] == [0, 0, 1, 1]
    assert [s.reward for s in samples] == [1.0, 0.0, 1.0, 0.0]
    assert [s.group for s in samples] == [0, 0, 1, 1]
    assert [s.prior for s in samples] == [2.0, 2.0, 1.0, 1.0]
    dataset = Dataset(samples)
    assert [len(g) for g in dataset.groups(dataset.all_indices(), samples)] == [2, 2]


def test_the_outputs_alone_are_trained(write_jsonl, model_tokenizer):
    """Not the prompt, and not what the assistant said in it."""
    chosen, rejected = load_samples(write_jsonl(pair()), model_tokenizer, max_length=None)
    trained = [model_tokenizer.decode(s.token_ids_T[s.trained_T]) for s in (chosen, rejected)]
    assert [text.startswith(answer) for text, answer in zip(trained, ("4", "five"), strict=True)] == [
        True
    ] * 2
    assert not any("yes" in text for text in trained)
    prompt = chosen.token_ids_T[: int(chosen.trained_T.argmax())].tolist()
    assert rejected.token_ids_T[: len(prompt)].tolist() == prompt


def test_held_out_rows_are_measured_on_the_preferred_output(write_jsonl, model_tokenizer):
    (sample,) = load_samples(write_jsonl(pair()), model_tokenizer, max_length=None, role="validation")
    assert model_tokenizer.decode(sample.token_ids_T[sample.trained_T]).startswith("4")
    assert (sample.reward, sample.problem) == (None, -1)


def test_pairs_do_not_join_a_group_that_has_their_number(write_jsonl, model_tokenizer):
    chat = {"messages": [*pair()["input"]["messages"], *pair()["preferred_output"]], "group": 1}
    samples = load_samples(write_jsonl(chat, pair()), model_tokenizer, max_length=None)
    assert [s.group for s in samples] == [0, 1, 1]


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        ({"input": pair()["input"]}, "missing_field", "no `preferred_output`"),
        (pair(input=[{"role": "user", "content": "hi"}]), "wrong_type", "no list of `messages`"),
        (pair(input={"messages": [], "tool": []}), "unknown_field", "input.tool"),
        (pair(preferred_output="4"), "wrong_type", "`preferred_output` is not a list"),
        (pair(preferred_output=[{"role": "user", "content": "4"}]), "wrong_type", "messages of user"),
        (pair(non_preferred_output=pair()["preferred_output"]), "equal_outputs", "are the same"),
        (pair(non_preferred_output=[{"role": "assistant", "content": ""}]), "empty_completion", "is empty"),
        (pair(messages=[]), "unknown_field", "`messages`"),
        (pair(reward=1), "unknown_field", "`reward`"),
    ],
)
def test_bad_rows(row, code, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_row(0, row)
    assert caught.value.code == code


def config(method: dict[str, Any]) -> Any:
    return parse_config({"model": "m", "training_file": "t", "method": method})


def test_the_report_counts_pairs(write_jsonl, model_dir):
    report = inspect_job(
        config({"type": "dpo"}), {"training": write_jsonl(pair(), pair())}, model_dir
    ).training
    assert report.to_dict()["pairs"] == 2
    assert (report.rows, report.samples, report.groups, report.group_sizes) == (2, 4, 2, {2: 2})
    assert (report.largest_group, report.has_rewards) == (2, True)
    assert not report.problems


def test_pairs_under_a_method_that_would_train_on_both_are_refused(write_jsonl, model_dir):
    report = inspect_job(config({"type": "supervised"}), {"training": write_jsonl(pair())}, model_dir)
    assert list(report.training.problems.counts) == ["unexpected_pairs"]


def test_preference_training_needs_pairs_everywhere(write_jsonl, model_dir):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    mixed = inspect_job(config({"type": "dpo"}), {"training": write_jsonl(chat, pair())}, model_dir)
    assert list(mixed.training.problems.counts) == ["not_a_pair"]
    none = inspect_job(config({"type": "dpo"}), {"training": write_jsonl(chat)}, model_dir)
    with pytest.raises(ConfigError, match="Give every row preferred_output") as caught:
        refuse_impossible_weighting(config({"type": "dpo"}), none.training)
    assert (caught.value.code, caught.value.param) == ("no_rewards", "method.dpo.reward.scheme")


def test_a_pair_does_not_fit_a_batch_of_one(write_jsonl, model_dir):
    method = {"type": "dpo", "dpo": {"training": {"batch_size": 1}}}
    report = inspect_job(config(method), {"training": write_jsonl(pair())}, model_dir)
    assert list(report.training.problems.counts) == ["group_too_large"]


def test_the_plan_counts_a_pair_as_two_samples(write_jsonl, tiny_dense):
    """Four pairs in batches of two samples: four steps an epoch, as the job itself will count."""
    method = {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 1, "n_epochs": 1}}}
    rows = [pair(id=j) for j in range(4)]
    data = inspect_job(config(method), {"training": write_jsonl(*rows)}, tiny_dense)
    assert plan(config(method), ModelInfo.read(tiny_dense), data).total_steps == 4
