"""Columns and groups: what the driver sees of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from modeseek_ray.data.cursor import Cursor
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.types import Evidence, Sample


def sample(row: int, **more) -> Sample:
    trained_T = np.array([False] + [True] * (row + 1))
    return Sample(row, np.arange(row + 2, dtype=np.int32), trained_T, **more)


def test_columns_by_hand():
    dataset = Dataset(
        [sample(0, group=4, reward=1.0), sample(1, prior=2.0), sample(2, group=4)],
        replay=[sample(0, group=4, is_replay=True)],
    )
    assert dataset.row_N.tolist() == [0, 1, 2, 0]
    assert dataset.num_tokens_N.tolist() == [1, 2, 3, 1]
    assert dataset.length_N.tolist() == [2, 3, 4, 2]
    assert dataset.prior_N.tolist() == [1, 2, 1, 1]
    assert dataset.is_replay_N.tolist() == [False, False, False, True]
    assert dataset.group_N.tolist() == [0, 1, 0, 2]  # replay's group 4 is another prompt
    assert dataset.rewards_N is not None
    np.testing.assert_equal(dataset.rewards_N, [1.0, np.nan, np.nan, np.nan])
    assert (len(dataset), dataset.num_new, dataset.largest_group) == (4, 3, 2)


def test_columns_nobody_gave_are_none():
    dataset = Dataset([sample(0), sample(1)])
    assert (dataset.rewards_N, dataset.log_behavior_N, dataset.log_reference_N) == (None, None, None)
    (group,) = dataset.groups(np.array([0]), [])
    assert (group.rewards_N, group.log_behavior_N, group.log_reference_N) == (None, None, None)


def test_logged_log_probabilities_count_only_if_every_new_row_has_them():
    assert Dataset([sample(0, log_behavior=-1.0), sample(1)]).log_behavior_N is None
    dataset = Dataset([sample(0, log_behavior=-1.0)], replay=[sample(0)])
    np.testing.assert_equal(dataset.log_behavior_N, [-1.0, np.nan])


def test_groups_point_into_their_block():
    samples = [sample(i, group=g) for i, g in enumerate([0, 1, 0, -1, 1])]
    dataset = Dataset(samples).with_columns(log_reference_N=-np.arange(5, dtype=np.float64))
    index_N = np.array([4, 3, 2, 1])
    block = [samples[i] for i in index_N]
    groups = dataset.groups(index_N, block)
    assert [g.row_N.tolist() for g in groups] == [[4, 1], [3], [2]]
    for group in groups:
        assert [block[j].row for j in group.payload.index_N] == group.row_N.tolist()
        assert group.log_reference_N is not None
        assert group.log_reference_N.tolist() == (-group.row_N).tolist()
    evidence = Evidence.of(groups)
    assert evidence.group_N is not None and evidence.group_N.tolist() == [0, 0, 1, 2]


def test_a_column_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 entries for 1 samples"):
        Dataset([sample(0)]).with_columns(log_reference_N=np.zeros(2))


def test_the_original_stays_without_the_new_column():
    dataset = Dataset([sample(0)])
    assert dataset.with_columns(log_reference_N=np.ones(1)).log_reference_N is not None
    assert dataset.log_reference_N is None


def test_no_samples_no_groups():
    dataset = Dataset([])
    assert dataset.groups(dataset.all_indices(), []) == []


def test_with_a_cursor_every_prompt_arrives_whole():
    group_of = [0, 1, 2, 0, 1, 0, -1, 2]
    dataset = Dataset(
        [sample(i, group=g) for i, g in enumerate(group_of)], replay=[sample(0, is_replay=True)] * 3
    )
    cursor = Cursor(dataset.group_N, 4, seed=0, epochs=2, is_replay_N=dataset.is_replay_N, replay_share=0.25)
    seen = [g for batch in cursor for g in dataset.groups(batch, None) if g.prompt < 4]
    assert sorted(tuple(g.row_N) for g in seen) == sorted([(0, 3, 5), (1, 4), (2, 7), (6,)] * 2)
