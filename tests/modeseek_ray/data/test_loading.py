"""From files to samples: lengths, truncation, log-probabilities, groups, accepted answers."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError
from tests.modeseek_ray.data.chat_models import CHATML, build_tokenizer, write_model


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """One token per ASCII character, so that lengths can be counted by eye."""
    directory = tmp_path_factory.mktemp("bytewise")
    return ChatTokenizer(write_model(directory, CHATML, build_tokenizer(merges=False)))


@pytest.fixture
def load(write_jsonl, bytewise):
    def load(*rows, max_length=None, **more):
        return load_samples(write_jsonl(*rows), bytewise, max_length=max_length, **more)

    return load


def row(prompt="abc", completion="de", **more):
    return {"prompt": prompt, "completion": completion, **more}


def test_a_sample_by_hand(load):
    (sample,) = load(row(weight=2, reward=0.5, task="t", logprobs=[-1, -2, -3]))
    assert sample.trained_T.tolist() == [False] * 3 + [True] * 3  # d, e, end
    assert (sample.length, sample.num_tokens, sample.row) == (6, 3, 0)
    assert (sample.prior, sample.reward, sample.task) == (2.0, 0.5, "t")
    assert sample.log_behavior == -6.0
    assert sample.log_behavior_T.tolist() == [0, 0, 0, -1, -2, -3]
    assert sample.token_ids_T.dtype == np.int32 and sample.log_behavior_T.dtype == np.float32


def test_row_numbers_are_lines_even_past_blank_ones(load):
    assert [s.row for s in load(row(), b"", row())] == [0, 2]


def test_groups_are_numbered_by_first_appearance(load):
    samples = load(row(group="x"), row(), row(group=7), row(group="x"), row(group="7"))
    assert [s.group for s in samples] == [0, -1, 1, 0, 2]


def test_replay_rows_are_marked(load):
    assert [s.is_replay for s in load(row(), role="replay")] == [True]


def test_accepted_answers_share_their_problem(load):
    samples = load(row(), row(accept=["f", "gh"]), row(task="t"), role="validation")
    assert [s.problem for s in samples] == [-1, 1, 1, 1, -1]
    assert [s.num_tokens for s in samples] == [3, 3, 2, 3, 3]
    assert [s.row for s in samples] == [0, 1, 1, 1, 2]


def test_a_long_sample_is_refused_with_both_lengths(load):
    assert len(load(row(), max_length=6)) == 1
    with pytest.raises(DataError, match="has 6 tokens, but at most 5 are allowed") as refused:
        load(row(), max_length=5)
    assert (refused.value.code, refused.value.line) == ("too_long", 1)


def test_a_long_sample_is_cut_on_demand_and_its_log_probabilities_with_it(load):
    (sample,) = load(row(logprobs=[-1, -2, -3]), max_length=5, truncate=True)
    assert (sample.length, sample.num_tokens, sample.log_behavior) == (5, 2, -3.0)
    assert sample.log_behavior_T.tolist() == [0, 0, 0, -1, -2]
    with pytest.raises(DataError, match="the sum in `logprobs` no longer fits"):
        load(row(logprobs=-6), max_length=5, truncate=True)
    with pytest.raises(DataError, match="no token is trained on once it is cut"):
        load(row(), max_length=3, truncate=True)


def test_the_wrong_number_of_log_probabilities_is_refused(load):
    with pytest.raises(DataError, match="`logprobs` has 2 numbers for 3 trained tokens") as refused:
        load(row(), row(logprobs=[-1, -2]))
    assert (refused.value.code, refused.value.line) == ("bad_logprobs", 2)
    (summed,) = load(row(logprobs=-6))
    assert (summed.log_behavior, summed.log_behavior_T) == (-6.0, None)


def test_a_repeated_id_is_refused_with_both_lines(load):
    with pytest.raises(DataError, match="'a' was used before, in line 1") as refused:
        load(row(id="a"), row(id=1), row(id="1"), row(id="a"))
    assert (refused.value.code, refused.value.line) == ("duplicate_id", 4)


def test_the_first_problem_is_raised_and_the_others_are_counted(load):
    with pytest.raises(DataError) as refused:
        load(row(), row(reward=1e9), b"{", row(completion=""), b"{")
    error = refused.value
    assert (error.line, error.code) == (2, "bad_reward")
    assert "rows.jsonl:2: `reward` is 1e+09" in str(error)
    assert "of 4 problems in all: 2 x malformed_json, 1 x bad_reward, 1 x empty_completion" in str(error)


def test_a_token_the_model_has_no_embedding_for_is_refused(write_jsonl, tmp_path):
    model = write_model(tmp_path / "model", CHATML, build_tokenizer(merges=False))
    (model / "config.json").write_text('{"vocab_size": 50}')
    with pytest.raises(DataError, match="the model knows 50 tokens") as refused:
        load_samples(write_jsonl(row(completion="~")), ChatTokenizer(model), max_length=None)
    assert refused.value.code == "unknown_token"


def test_many_rows_span_several_encoding_rounds(load):
    samples = load(*[row(completion=str(i)) for i in range(2500)])
    assert [s.row for s in samples] == list(range(2500))
    assert all(s.num_tokens == len(str(s.row)) + 1 for s in samples)


def test_loading_costs_no_more_than_fifty_readings_of_the_file(write_jsonl, model_tokenizer):
    """Beside JSON alone, in one run: encoding row by row, or anything that grows with the square, shows."""
    messages = [{"role": "user", "content": "sort these words"}, {"role": "assistant", "content": "good"}]
    path = write_jsonl(*[{"messages": messages}] * 20_000)
    started = time.process_time()
    rows = [json.loads(line) for line in path.read_text().splitlines() for _ in range(10)]
    read = time.process_time()
    samples = load_samples(path, model_tokenizer, max_length=64)
    loaded = time.process_time()
    assert len(rows) == 10 * len(samples) == 200_000
    assert loaded - read < 5 * (read - started)
