"""Overlap, KL and load, with numbers a person can work out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modeseek_ray.errors import RoutingError
from modeseek_ray.routing.compare import compare_routes, mismatch, router_load


def test_shares_of_tokens_and_of_token_routers_are_different_things() -> None:
    """Four tokens, two routers: one of eight choices differs in one expert, one in both."""
    one = np.array([[[0, 1], [4, 5]]] * 4)
    other = one.copy()
    other[1, 0] = [1, 2]
    other[1, 1] = [6, 7]

    difference = compare_routes(one, other)

    assert difference.overlap == (6 * 1 + 0.5 + 0) / 8
    assert difference.share_differing == 2 / 8
    assert difference.share_tokens_changed == 1 / 4
    assert difference.share_differing_L.tolist() == [1 / 4, 1 / 4]
    assert difference.num_tokens == 4
    assert difference.metrics()["routing/overlap"] == 6.5 / 8


def test_the_order_of_experts_and_the_integer_type_do_not_count() -> None:
    one = np.array([[[200, 3, 7]]], dtype=np.uint8)
    other = np.array([[[7, 200, 3]]], dtype=np.int16)
    assert compare_routes(one, other).share_differing == 0
    assert compare_routes(one, other).overlap == 1


def test_live_rows_are_left_out() -> None:
    one = np.array([[[0, 1]], [[-1, -1]], [[2, 3]]])
    other = np.array([[[0, 1]], [[5, 4]], [[3, 4]]])

    difference = compare_routes(one, other)

    assert (difference.num_tokens, difference.overlap, difference.share_tokens_changed) == (2, 0.75, 0.5)
    nothing = compare_routes(one * 0 - 1, other)
    assert (nothing.num_tokens, nothing.overlap, nothing.share_differing) == (0, 1.0, 0.0)


def test_a_router_with_fewer_experts_per_token_is_compared_on_those() -> None:
    one = np.array([[[0, 1], [3, -1]], [[0, 1], [3, -1]]])
    other = np.array([[[0, 1], [3, -1]], [[0, 1], [2, -1]]])

    difference = compare_routes(one, other)

    assert difference.overlap == 3 / 4
    assert difference.share_differing_L.tolist() == [0, 1 / 2]


def test_other_tokens_cannot_be_compared() -> None:
    with pytest.raises(RoutingError, match="cannot be compared"):
        compare_routes(np.zeros((2, 1, 2), dtype=int), np.zeros((3, 1, 2), dtype=int))


def test_k3_is_the_divergence_from_the_writer() -> None:
    """Enumerate a two-token vocabulary: p = (.5, .5), q = (.9, .1); KL(p || q) = .510826, KL(q || p) = .368064."""
    p, q = np.log([0.5, 0.5]), np.log([0.9, 0.1])
    # the expectation under p: both tokens equally often
    forward = mismatch(p, q, writer="engine", reader="trainer")
    # the expectation under q: nine of the first, one of the second
    backward = mismatch(q[[0] * 9 + [1]], p[[0] * 9 + [1]], writer="trainer", reader="engine")

    assert forward.kl_nats == pytest.approx(0.510826, abs=1e-6)
    assert backward.kl_nats == pytest.approx(0.368064, abs=1e-6)
    assert forward.share_far == 0.5  # .1 is a fifth of .5; .9 is less than twice .5
    assert forward.max_abs == pytest.approx(math.log(5))
    assert "mismatch/engine_trainer/kl_nats" in forward.metrics()


def test_equal_programs_do_not_differ() -> None:
    same = mismatch(np.log([0.3, 0.2]), np.log([0.3, 0.2]), writer="engine", reader="trainer")
    assert (same.kl_nats, same.share_far, same.mean_abs, same.num_tokens) == (0, 0, 0, 2)
    assert mismatch(np.zeros(0), np.zeros(0), writer="a", reader="b").kl_nats == 0


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(RoutingError, match=r"engine rated \(2,\) tokens and trainer \(1,\)"):
        mismatch(np.zeros(2), np.zeros(1), writer="engine", reader="trainer")
    with pytest.raises(RoutingError, match="token 1: engine says -inf"):
        mismatch(np.array([0, -np.inf]), np.zeros(2), writer="engine", reader="trainer")


def test_an_even_load_has_no_variation_and_a_single_expert_has_all() -> None:
    even = np.array([[[0, 1]], [[2, 3]]])
    assert router_load(even, 4).variation_L.tolist() == [0]
    # one expert of four takes everything: counts (8, 0, 0, 0), mean 2, deviation sqrt(12)
    alone = router_load(np.zeros((8, 1, 1), dtype=np.uint8), 4)
    assert alone.variation_L[0] == pytest.approx(math.sqrt(12) / 2)
    assert alone.metrics()["routing/dead_experts"] == 3


def test_load_is_counted_router_by_router_without_live_rows() -> None:
    routes = np.array([[[0, 1], [2, -1]], [[-1, -1], [0, -1]]])
    load = router_load(routes, [2, 3])
    assert [c.tolist() for c in load.counts_L] == [[1, 1], [1, 0, 1]]
    assert load.num_dead_L.tolist() == [0, 1]
    with pytest.raises(RoutingError, match="router 1 has 2 experts, its routes name 2"):
        router_load(routes, 2)
