"""Routes as they travel: types, checks, vLLM's form, batches."""

from __future__ import annotations

import numpy as np
import pytest

from modeseek_ray.errors import RoutingError
from modeseek_ray.routing.wire import (
    MoeLayers,
    batch_routes,
    check_routes,
    compact,
    from_vllm,
    split_batch,
)


def layers(*hidden: int, num_experts: int = 8, top_k: int = 2) -> MoeLayers:
    count = len(hidden)
    return MoeLayers(
        names_L=tuple(f"layers.{h}.mlp.gate" for h in hidden),
        hidden_L=hidden,
        num_experts_L=(num_experts,) * count,
        top_k_L=(top_k,) * count,
    )


@pytest.mark.parametrize(
    ("num_experts", "live", "dtype"),
    [
        (256, False, np.uint8),
        (257, False, np.int16),
        (128, True, np.int8),
        (129, True, np.int16),
        (32768, False, np.int16),
    ],
)
def test_the_smallest_integers_that_hold_every_expert(num_experts: int, live: bool, dtype: type) -> None:
    routes = np.array([[[num_experts - 1, 0]], [[-1, -1] if live else [1, 2]]])

    packed = compact(routes, num_experts)

    assert packed.dtype == dtype
    assert (packed == routes).all()


@pytest.mark.parametrize(("value", "num_experts"), [(8, 8), (-2, 8), (0, 32769)])
def test_experts_that_do_not_exist_are_not_packed(value: int, num_experts: int) -> None:
    with pytest.raises(RoutingError):
        compact(np.array([[[value, 1]]]), num_experts)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([[[0, 8]]], "name expert 8; it has experts 0 to 7"),
        ([[[0, -2]]], "name expert -2"),
        ([[[3, 3]]], "name one expert twice"),
        ([[[3, -1]]], "left open"),
        ([[[-1, 3]]], "left open"),
        ([[[0, 1, 2]]], r"expected \[..., 1, 2\]"),
        ([[[0, 1], [2, 3]]], r"has 1 routers"),
        ([[[0.0, 1.0]]], "expected whole numbers"),
    ],
)
def test_routes_that_do_not_fit_the_model_are_refused(routes: list, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        check_routes(np.array(routes), layers(1))


def test_the_router_that_does_not_fit_is_named() -> None:
    routes = np.array([[[0, 1], [2, 2]]])
    with pytest.raises(RoutingError, match="layers.5.mlp.gate"):
        check_routes(routes, layers(2, 5))


def test_rows_of_minus_one_and_unsigned_integers_are_fine() -> None:
    check_routes(np.array([[[-1, -1]], [[7, 0]]], dtype=np.int16), layers(0))
    check_routes(np.array([[[7, 0]]], dtype=np.uint8), layers(0))
    check_routes(np.zeros((0, 1, 2), dtype=np.uint8), layers(0))


def test_a_router_that_asks_fewer_experts_fills_its_rows_up() -> None:
    both = MoeLayers(("a", "b"), (0, 1), (4, 4), (2, 1))
    check_routes(np.array([[[0, 1], [3, -1]]]), both)
    with pytest.raises(RoutingError, match="b name more than its 1"):
        check_routes(np.array([[[0, 1], [3, 2]]]), both)


def test_vllm_gives_dense_layers_too() -> None:
    # 3 tokens, 4 hidden layers of which 1 and 3 have experts; layer h, token t asks experts h and h + t + 1
    engine = np.zeros((3, 4, 2), dtype=np.uint8)
    for hidden in (1, 3):
        engine[:, hidden, 0] = hidden
        engine[:, hidden, 1] = hidden + 1 + np.arange(3)

    routes = from_vllm(engine, layers(1, 3))

    assert routes.dtype == np.uint8
    assert routes.tolist() == [[[1, 2], [3, 4]], [[1, 3], [3, 5]], [[1, 4], [3, 6]]]


def test_another_layer_map_than_vllms_is_noticed() -> None:
    engine = np.zeros((3, 4, 2), dtype=np.uint8)
    engine[:, (1, 3)] = [2, 5]

    with pytest.raises(RoutingError, match=r"routes in layers \[3\], which are dense"):
        from_vllm(engine, layers(1))
    with pytest.raises(RoutingError, match="layers.2.mlp.gate name one expert twice"):
        from_vllm(engine, layers(1, 2, 3))
    with pytest.raises(RoutingError, match="more than 4 layers"):
        from_vllm(engine, layers(1, 4))
    with pytest.raises(RoutingError, match="several routers in one layer"):
        from_vllm(engine, layers(1, 1))


def test_more_than_256_experts_arrive_whole() -> None:
    engine = np.array([[[400, 2]], [[511, 300]]], dtype=np.uint16)

    routes = from_vllm(engine, layers(0, num_experts=512))

    assert routes.dtype == np.int16
    assert batch_routes([routes], length=3)[0, :, 0].tolist() == [[400, 2], [511, 300], [-1, -1]]


def test_a_batch_is_padded_with_live_rows_and_split_again() -> None:
    first = np.array([[[1, 2]], [[3, 4]]], dtype=np.uint8)  # three tokens: two rows
    second = np.array([[[5, 6]]], dtype=np.uint8)

    batch = batch_routes([first, None, second], length=3)

    assert batch.shape == (3, 3, 1, 2) and batch.dtype == np.int16
    assert batch[:, :, 0, 0].tolist() == [[1, 3, -1], [-1, -1, -1], [5, -1, -1]]
    again = split_batch(batch, [3, 1, 2], num_experts=8)
    assert [r.tolist() for r in again] == [first.tolist(), [], second.tolist()]
    assert {r.dtype for r in again} == {np.dtype(np.uint8)}


def test_a_batch_without_routes_takes_its_shape_from_the_model() -> None:
    assert (batch_routes([None], length=2, layers=layers(0, 1)) == np.full((1, 2, 2, 2), -1)).all()
    with pytest.raises(RoutingError, match="the model was not named"):
        batch_routes([None], length=2)


def test_samples_that_do_not_go_together_are_refused() -> None:
    one, two = np.zeros((1, 1, 2), dtype=np.uint8), np.zeros((1, 2, 2), dtype=np.uint8)
    with pytest.raises(RoutingError, match="different routers"):
        batch_routes([one, two], length=2)
    with pytest.raises(RoutingError, match="sample 0 has routes for 1 of 0 positions"):
        batch_routes([one], length=0)
    with pytest.raises(RoutingError, match="beyond 32767"):
        batch_routes([np.full((1, 1, 1), 40_000, dtype=np.uint16)], length=1)
