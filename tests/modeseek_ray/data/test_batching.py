"""Micro-batches and ranks: every sample once, limits kept, little padding, the best cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeseek_ray.data.batching import FIXED_COST_SHARE, deal, pack, padding_share

LENGTHS = st.lists(st.integers(1, 60), max_size=40).map(lambda x: np.array(x, dtype=np.int64))


@given(LENGTHS, st.integers(1, 100), st.none() | st.integers(1, 5))
def test_pack_keeps_every_sample_once_and_the_limits(length_N, max_tokens, max_samples):
    micro_batches = pack(length_N, max_tokens, max_samples)
    assert sorted(itertools.chain(*micro_batches)) == list(range(len(length_N)))
    for indices in micro_batches:
        assert len(indices) == 1 or length_N[indices].max() * len(indices) <= max_tokens
        assert max_samples is None or len(indices) <= max_samples
        assert (np.diff(indices) > 0).all()
    longest = [length_N[m].max() for m in micro_batches]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(4, 40))
def test_pack_finds_the_cheapest_cut_that_brute_force_finds(lengths, max_tokens):
    ordered = sorted(lengths, reverse=True)

    def cost(parts):
        return sum(max(p) * len(p) + FIXED_COST_SHARE * max_tokens for p in parts)

    def cuts():
        for ends in itertools.product([0, 1], repeat=len(ordered) - 1):
            at = [0, *[i + 1 for i, end in enumerate(ends) if end], len(ordered)]
            parts = [ordered[a:b] for a, b in itertools.pairwise(at)]
            if all(len(p) == 1 or p[0] * len(p) <= max_tokens for p in parts):
                yield parts

    length_N = np.array(lengths)
    found = [length_N[m].tolist() for m in pack(length_N, max_tokens)]
    assert cost(found) == pytest.approx(min(cost(parts) for parts in cuts()))


def test_a_sample_longer_than_the_limit_stands_alone():
    assert [m.tolist() for m in pack(np.array([3, 50, 3]), max_tokens=10)] == [[1], [0, 2]]


def test_a_short_sample_is_not_padded_to_a_long_one():
    # together: 2 x 1000 positions; apart: 1000 + 10
    assert [m.tolist() for m in pack(np.array([10, 1000]), max_tokens=8192)] == [[1], [0]]


def test_equal_lengths_fill_micro_batches():
    assert [len(m) for m in pack(np.full(10, 8), max_tokens=32)] in ([4, 4, 2], [4, 2, 4], [2, 4, 4])


def test_pack_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="at least one"):
        pack(np.array([1]), max_tokens=0)
    with pytest.raises(ValueError, match="at least one token"):
        pack(np.array([0]), max_tokens=5)
    assert pack(np.array([], dtype=np.int64), max_tokens=5) == []


@given(LENGTHS, st.integers(1, 6))
def test_deal_keeps_every_sample_once_and_the_balance(length_N, num_ranks):
    ranks = deal(length_N, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(itertools.chain(*ranks)) == list(range(len(length_N)))
    assert all((np.diff(r) > 0).all() for r in ranks)
    if len(length_N):
        # list scheduling: no rank is above the mean by more than one sample
        loads = [length_N[r].sum() for r in ranks]
        assert max(loads) <= length_N.sum() / num_ranks + length_N.max()


@given(st.integers(1, 30), st.integers(1, 6))
def test_equal_lengths_are_dealt_evenly(count, num_ranks):
    sizes = [len(r) for r in deal(np.full(count, 7), num_ranks)]
    assert max(sizes) - min(sizes) <= 1


def test_deal_by_hand():
    # 7 -> rank 0, 5 -> rank 1, 4 -> rank 1 (5 < 7), 3 -> rank 0 (7 < 9), 1 -> rank 1 (9 < 10)
    assert [r.tolist() for r in deal(np.array([1, 3, 4, 5, 7]), 2)] in ([[1, 4], [0, 2, 3]],)


def test_equal_loads_go_to_the_rank_with_fewer_samples():
    # 4 | 3 3, then 1 and 1 to rank 0: both have 6, and the last 1 goes where there are two samples
    assert [r.tolist() for r in deal(np.array([4, 3, 3, 1, 1, 1]), 2)] == [[0, 3, 4], [1, 2, 5]]


def test_more_ranks_than_samples_leaves_some_without():
    assert [len(r) for r in deal(np.array([4, 4]), 3)] == [1, 1, 0]


def test_padding_share_by_hand():
    # one batch of one rank, lengths 10 and 8 in one micro-batch: 20 computed, 18 used
    share = padding_share(np.array([10, 8]), batch_size=2, num_ranks=1, max_tokens=1000)
    assert share == pytest.approx(1 - 18 / 20)
    assert padding_share(np.array([], dtype=np.int64), batch_size=2, num_ranks=1, max_tokens=10) == 0.0


def test_padding_of_mixed_lengths_is_a_fraction_of_padding_to_the_longest():
    length_N = np.random.default_rng(0).lognormal(4.5, 0.7, 2000).astype(int) + 1
    batches = length_N[: 31 * 64].reshape(31, 64)
    to_the_longest = 1 - batches.sum() / (batches.max(axis=1) * 64).sum()
    assert to_the_longest > 0.7
    assert padding_share(length_N, batch_size=64, num_ranks=1, max_tokens=8192) < 0.1
