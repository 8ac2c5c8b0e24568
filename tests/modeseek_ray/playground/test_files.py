"""The data files: exact answers, disjoint inputs, the same bytes for the same seed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from modeseek_ray.playground import corpus, data_files, new_task
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.files import FILES, RETENTION_ROWS, TRAINING_PROMPTS, VALIDATION_PROMPTS
from modeseek_ray.playground.skills import SKILLS, is_held_out


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return data_files(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def rows(paths):
    return {
        name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()
    }


def _asked(row):
    """The input of a chat row: the last word of its question."""
    return row["messages"][0]["content"].split(" ")[-1]


def _answer(row):
    return row["messages"][1]["content"]


def test_all_files_are_there(paths):
    assert set(paths) == set(FILES)
    assert all(path.name == f"{name}.jsonl" for name, path in paths.items())


def test_every_training_answer_is_right_and_carries_its_format(rows):
    for row in rows["new-task.train"]:
        task, name = row["task"].split("/")
        assert task == new_task.NAME
        assert _answer(row) == new_task.answers(_asked(row))[name]


def test_each_prompt_comes_once_in_each_format_and_is_one_group(rows):
    by_group = defaultdict(list)
    for row in rows["new-task.train"]:
        by_group[row["group"]].append(row)
    assert len(by_group) == TRAINING_PROMPTS
    for group in by_group.values():
        assert len({_asked(row) for row in group}) == 1
        assert Counter(row["task"] for row in group) == {f"rotate/{name}": 1 for name in new_task.FORMATS}
    assert len({_asked(group[0]) for group in by_group.values()}) == TRAINING_PROMPTS


def test_ids_are_unique(rows):
    ids = [row["id"] for row in rows["new-task.train"]]
    assert len(set(ids)) == len(ids)


def test_training_rows_are_shuffled(rows):
    groups = [row["group"] for row in rows["new-task.train"]]
    assert sum(a == b for a, b in pairwise(groups)) < len(groups) / 100


def test_rewarded_rows_are_the_training_rows_with_a_reward(rows):
    rewards = new_task.rewards()
    for plain, rewarded in zip(rows["new-task.train"], rows["new-task.rewarded"], strict=True):
        assert rewarded == {**plain, "reward": rewards[plain["task"].split("/")[1]]}


def test_validation_accepts_every_format(rows):
    assert len(rows["new-task.valid"]) == VALIDATION_PROMPTS
    for row in rows["new-task.valid"]:
        assert [_answer(row), *row["accept"]] == list(new_task.answers(_asked(row)).values())


def test_no_held_out_input_is_trained_on(rows):
    for name in ("new-task.train", "new-task.rewarded"):
        assert not any(is_held_out(_asked(row)) for row in rows[name])
    assert all(is_held_out(_asked(row)) for row in rows["new-task.valid"])
    skills = {skill.name for skill in SKILLS}
    assert all(is_held_out(_asked(r)) for r in rows["old-tasks.retention"] if r["task"] in skills)
    assert not any(is_held_out(_asked(r)) for r in rows["old-mix.replay"] if r["task"] in skills)


def test_held_out_text_is_not_replayed(rows):
    training = set(corpus.training_documents())
    held_out = set(corpus.held_out_documents())
    assert not training & held_out

    def documents(name):
        return [row["prompt"] + row["completion"] for row in rows[name] if row["task"] == "text"]

    assert len(documents("old-tasks.retention")) == RETENTION_ROWS
    assert set(documents("old-tasks.retention")) <= held_out
    assert set(documents("old-mix.replay")) <= training


def test_retention_asks_every_skill_and_every_fact(rows):
    counts = Counter(row["task"] for row in rows["old-tasks.retention"])
    expected = {skill.name: RETENTION_ROWS for skill in SKILLS} | {
        "facts": len(facts()),
        "text": RETENTION_ROWS,
    }
    assert counts == expected
    answer_of = {skill.name: skill.answer for skill in SKILLS}
    for row in rows["old-tasks.retention"]:
        if row["task"] in answer_of:
            assert _answer(row) == answer_of[row["task"]](_asked(row))


def test_same_seed_same_bytes(paths, tmp_path):
    for name, path in data_files(tmp_path).items():
        assert path.read_bytes() == paths[name].read_bytes()


def test_another_seed_other_rows(paths, tmp_path):
    other = data_files(tmp_path, seed=1)
    assert other["new-task.train"].read_bytes() != paths["new-task.train"].read_bytes()


def test_files_are_written_once(paths):
    home = paths["new-task.train"].parents[2]
    before = paths["new-task.train"].stat().st_mtime_ns
    assert data_files(home) == paths
    assert paths["new-task.train"].stat().st_mtime_ns == before
