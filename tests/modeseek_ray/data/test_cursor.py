"""The order of the data: each row once per epoch, groups whole, exact to resume anywhere."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeseek_ray.data.cursor import Cursor, steps_per_epoch
from modeseek_ray.errors import ConfigError, StorageError

GROUPS = np.array([0, 0, 0, -1, 1, 1, -1, 2, 2, 2, 1, -1, 3])


def make(group_N=GROUPS, batch_size=4, replay=0, **changes):
    settings = {"seed": 7, "epochs": 3, **changes}
    is_replay_N = np.arange(len(group_N) + replay) >= len(group_N)
    return Cursor(
        np.concatenate([group_N, np.full(replay, -1)]), batch_size, is_replay_N=is_replay_N, **settings
    )


@given(
    st.lists(st.integers(-1, 6), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.0, 0.05, 0.25, 0.5]),
)
def test_each_epoch_has_every_row_once_and_groups_whole(groups, extra, seed, share):
    group_N = np.array(groups)
    largest = max([1, *np.bincount(group_N[group_N >= 0])])
    batch_size = int(np.ceil((largest + extra) / (1 - share)))
    replay = 5 if share else 0
    cursor = make(group_N, batch_size, replay=replay, seed=seed, epochs=2, replay_share=share)
    batches = [b[b < len(group_N)] for b in cursor]
    half = cursor.steps_per_epoch
    assert len(batches) == cursor.num_steps == 2 * half == 2 * steps_per_epoch(len(groups), batch_size, share)
    for epoch in (batches[:half], batches[half:]):
        assert sorted(itertools.chain(*epoch)) == list(range(len(group_N)))
        homes = [(g, k) for k, batch in enumerate(epoch) for g in set(group_N[batch]) if g >= 0]
        assert len(homes) == len({g for g, _ in homes})  # no group in two batches
        assert all(len(batch) for batch in epoch)
        assert all(len(batch) < batch_size + largest for batch in epoch)


def test_groups_stay_adjacent_inside_a_batch():
    for batch in make():
        names = [g for g, _ in itertools.groupby(GROUPS[batch]) if g >= 0]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("replay", [0, 3])
def test_resuming_at_every_step_equals_the_uninterrupted_order(replay):
    settings = {"batch_size": 5, "replay": replay, "replay_share": 0.2 if replay else 0.0}
    whole = [b.tolist() for b in make(**settings)]
    assert len(whole) == make(**settings).num_steps
    for stop in range(len(whole) + 1):
        first = make(**settings)
        before = [next(first).tolist() for _ in range(stop)]
        second = make(**settings)
        second.restore(json.loads(json.dumps(first.state())))
        assert before + [b.tolist() for b in second] == whole


def test_restoring_costs_no_replayed_steps():
    cursor = make(epochs=1_000_000)
    cursor.restore({**cursor.state(), "step": 3_000_000})
    assert len(next(cursor)) > 0  # at once, not after three million batches


def test_a_state_of_other_data_is_refused():
    state = make(seed=1).state()
    with pytest.raises(StorageError, match="'seed': 1"):
        make(seed=2).restore(state)
    with pytest.raises(StorageError, match="batch_size"):
        make(seed=1, batch_size=6).restore(state)


def test_the_order_depends_on_seed_and_epoch_alone():
    first, same, other = ([b.tolist() for b in make(seed=s)] for s in (1, 1, 2))
    assert first == same != other
    half = len(first) // 3
    assert first[:half] != first[half : 2 * half]
    np.random.seed(0)
    assert [b.tolist() for b in make(seed=1)] == first


def test_sizes_without_groups_are_exact_and_the_last_batch_is_kept():
    assert [len(b) for b in make(np.full(10, -1), 4, epochs=2)] == [4, 4, 2, 4, 4, 2]
    assert make(np.full(10, -1), 4, epochs=2, max_steps=4).num_steps == 4
    assert len(list(make(np.full(10, -1), 4, epochs=None, max_steps=7))) == 7


def test_replay_takes_its_share_of_each_batch_and_goes_round_its_rows():
    cursor = make(np.full(300, -1), 20, replay=7, replay_share=0.05, epochs=4)
    batches = list(cursor)
    assert {len(b) for b in batches} == {20, 15 + 1}  # 15 x 19 new rows, then 15 with their share
    replay = [int(i) for b in batches for i in b[b >= 300]]
    assert [int((b >= 300).sum()) for b in batches[:16]] == [1] * 16
    # an endless shuffle: among each seven drawn, every one of the seven rows
    for start in range(0, len(replay) - 6, 7):
        assert sorted(replay[start : start + 7]) == list(range(300, 307))


def test_a_share_below_one_row_is_met_over_the_steps():
    batches = list(make(np.full(1000, -1), 8, replay=50, replay_share=0.01, epochs=1))
    drawn = np.cumsum([(b >= 1000).sum() for b in batches[:-1]])
    wanted = 0.08 * np.arange(1, len(batches))
    assert np.abs(drawn - wanted).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2}, "a group of 3 rows is never split"),
        ({"epochs": None}, "neither epochs nor max_steps"),
        ({"group_N": np.array([], dtype=int)}, "has no rows"),
        (
            {"group_N": np.full(5, -1), "batch_size": 1, "replay": 2, "replay_share": 0.5},
            "leaves no new rows",
        ),
    ],
)
def test_impossible_batches_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_the_mend_of_a_large_group_is_enough():
    with pytest.raises(ConfigError) as refused:
        make(batch_size=3, replay=2, replay_share=0.5)
    least = int(refused.value.mend.split()[-1].rstrip("."))
    assert least == 6
    assert make(batch_size=least, replay=2, replay_share=0.5).num_steps > 0
