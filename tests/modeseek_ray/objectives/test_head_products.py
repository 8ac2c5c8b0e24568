"""How often the head multiplies: gradients known beforehand and kept chunks save a product, and no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeseek_ray.objectives import head
from modeseek_ray.objectives.logprobs import TokenScores, token_scores
from tests.modeseek_ray.objectives.test_logprobs import M, V, random_head, targets

CHUNK = 8  # positions: 5 chunks, the last one shorter
UPSTREAM_M = torch.linspace(-1, 2, M)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    """The chunks whose logits were computed, in order. Nothing is kept unless a test says so."""
    chunks: list[slice] = []
    compute = head.Logits.__call__

    def counting(self: head.Logits, part: slice) -> Tensor:
        chunks.append(part)
        return compute(self, part)

    monkeypatch.setattr(head.Logits, "__call__", counting)
    monkeypatch.setattr(head, "KEPT_BYTES", 0)
    return chunks


def scored(announced_M: Tensor | None = None) -> tuple[TokenScores, tuple[Tensor, ...]]:
    parts = random_head()
    hidden, weight, bias = parts
    return token_scores(
        hidden,
        weight,
        targets(),
        bias_V=bias,
        temperature=0.7,
        chunk_positions=CHUNK,
        statistics=True,
        announced_M=announced_M,
    ), parts


def all_bits(scores: TokenScores, parts: tuple[Tensor, ...]) -> list[Tensor]:
    """What came out, forward and backward."""
    forward = [column.detach() for column in scores if column is not None]
    return forward + [part.grad for part in parts if part.grad is not None]


def computed_again() -> list[Tensor]:
    """The way with nothing announced and nothing kept."""
    scores, parts = scored()
    scores.log_prob_M.backward(UPSTREAM_M)
    return all_bits(scores, parts)


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) == 7 and all(map(torch.equal, found, expected))


def test_without_either_every_chunk_is_computed_twice(computed: list[slice]) -> None:
    computed_again()
    assert len(computed) == 2 * 5


def test_an_announced_gradient_is_summed_up_in_the_forward_pass(computed: list[slice]) -> None:
    scores, parts = scored(UPSTREAM_M.clone())
    scores.log_prob_M.backward(UPSTREAM_M)
    assert len(computed) == 5
    assert same_bits(all_bits(scores, parts), computed_again())


@pytest.mark.parametrize("announced_M", [torch.zeros(M), UPSTREAM_M + 1e-7])
def test_another_gradient_than_announced_is_computed_as_ever(
    announced_M: Tensor, computed: list[slice]
) -> None:
    scores, parts = scored(announced_M)
    scores.log_prob_M.backward(UPSTREAM_M)
    assert len(computed) == 2 * 5
    assert same_bits(all_bits(scores, parts), computed_again())


@pytest.mark.parametrize(("positions", "recomputed"), [(M, 0), (20, 3), (4, 5)])
def test_whole_chunks_are_kept_as_far_as_there_is_room(
    positions: int, recomputed: int, computed: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEPT_BYTES", positions * V * 4)
    scores, parts = scored()
    scores.log_prob_M.backward(UPSTREAM_M)
    assert len(computed) == 5 + recomputed
    monkeypatch.setattr(head, "KEPT_BYTES", 0)
    assert same_bits(all_bits(scores, parts), computed_again())


@pytest.mark.parametrize("announced_M", [None, UPSTREAM_M])
def test_a_second_backward_pass_gives_the_same_again(
    announced_M: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEPT_BYTES", 20 * V * 4)
    scores, parts = scored(announced_M)
    first, second = (
        torch.autograd.grad(scores.log_prob_M, parts, UPSTREAM_M, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_graphs_share_the_room_and_give_it_back(
    computed: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is bounded for all micro-batches together, also those whose graphs are dropped."""
    monkeypatch.setattr(head, "KEPT_BYTES", (M + 20) * V * 4)
    graphs = [scored()[0] for _ in range(3)]

    def recomputed(scores: TokenScores) -> int:
        before = len(computed)
        scores.log_prob_M.backward(UPSTREAM_M)
        return len(computed) - before

    assert [recomputed(scores) for scores in graphs] == [0, 3, 5]
    dropped = scored()[0]
    assert head.Kept._bytes_of_all == M * V * 4
    del dropped, graphs
    assert head.Kept._bytes_of_all == 0
    assert recomputed(scored()[0]) == 0


def test_nothing_is_kept_without_gradient(computed: list[slice], monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer's memory is that of one chunk."""
    monkeypatch.setattr(head, "KEPT_BYTES", M * V * 4)
    allocated = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: allocated.append(tuple(t.shape)) or empty_like(t))
    hidden, weight, _ = random_head()
    with torch.no_grad():
        token_scores(hidden, weight, targets(), chunk_positions=CHUNK)
    assert len(computed) == 5 and not allocated


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = computed_again()
    monkeypatch.setattr(head, "BLOCK_BYTES", 3 * V * 4)
    assert same_bits(computed_again(), expected)
