"""Samples into a padded micro-batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from modeseek_ray.errors import DataError
from modeseek_ray.objectives.collate import collate
from modeseek_ray.types import Sample


def sample(row: int, tokens: list[int], trained: list[int]) -> Sample:
    return Sample(
        row=row, token_ids_T=np.array(tokens, dtype=np.int32), trained_T=np.array(trained, dtype=np.bool_)
    )


# Row 1 trains on its last two tokens, row 2 on a turn in the middle.
SAMPLES = [
    sample(0, [9], [0]),
    sample(1, [1, 2, 3], [0, 1, 1]),
    sample(2, [4, 5, 6, 7], [0, 1, 0, 1]),
]


def test_positions_predict_their_targets() -> None:
    batch = collate(SAMPLES, [2, 1], pad_id=0)
    assert batch.input_ids_BS.tolist() == [[4, 5, 6, 7], [1, 2, 3, 0]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions_M.tolist() == [0, 2, 4, 5]  # each one before its target
    assert batch.target_M.tolist() == [5, 7, 2, 3]
    assert batch.sample_M.tolist() == [0, 0, 1, 1]
    assert batch.num_tokens_B.tolist() == [2, 2]
    assert (batch.num_positions, batch.num_padded) == (8, 1)


def test_padded_to_a_multiple() -> None:
    batch = collate(SAMPLES, [1], pad_id=9, multiple_of=4)
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 9]]
    assert (batch.positions_M.tolist(), batch.num_padded) == ([0, 1], 1)
    assert collate(SAMPLES, [2, 1], pad_id=0, multiple_of=3).input_ids_BS.shape == (2, 6)


def test_a_sample_with_nothing_to_train_on() -> None:
    batch = collate(SAMPLES, np.array([0, 1]), pad_id=0)
    assert batch.num_tokens_B.tolist() == [0, 2]
    assert batch.sample_M.tolist() == [1, 1]


def test_training_on_the_first_token_is_refused() -> None:
    with pytest.raises(DataError, match="row 5 trains on its first token"):
        collate([sample(5, [1, 2], [1, 1])], [0], pad_id=0)


def test_the_samplers_log_probabilities_stand_beside_their_targets() -> None:
    log_behavior_T = np.array([0, -0.5, 0, -0.25], dtype=np.float32)
    known = dataclasses.replace(SAMPLES[2], log_behavior_T=log_behavior_T)
    batch = collate([SAMPLES[1], known], [1, 0], pad_id=0).to("cpu")
    assert batch.log_behavior_M is not None
    assert batch.log_behavior_M[:2].tolist() == [-0.5, -0.25]
    assert batch.log_behavior_M[2:].isnan().all(), "an unknown sampler is not one of probability one"
    assert collate(SAMPLES, [1], pad_id=0).log_behavior_M is None
