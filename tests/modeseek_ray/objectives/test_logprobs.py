"""Chunked log-probabilities, entropies and KL against the full logits in float64."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeseek_ray.objectives import head
from modeseek_ray.objectives.logprobs import Head, KlDirection, token_kl, token_kls, token_scores

M, D, V = 37, 16, 101


def random_head(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias with gradients; logits of deviation 4, as a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((M, D), (V, D), (V,))
    return tuple(torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)  # type: ignore


def as_float64(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def targets(seed: int = 1) -> Tensor:
    return torch.randint(V, (M,), generator=torch.Generator().manual_seed(seed))


def by_full_logits(
    upstream_M: Tensor, temperature: float, *parts: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """In float64: hidden states, weight and bias with the gradients of `upstream_M`, logits, log-probabilities."""
    exact = as_float64(*parts)
    logits_MV = (exact[0] @ exact[1].t() + exact[2]) / temperature
    log_prob_M = -F.cross_entropy(logits_MV, targets(), reduction="none")
    (log_prob_M * upstream_M).sum().backward()
    return exact, logits_MV, log_prob_M


@pytest.mark.parametrize("chunk_positions", [1, 8, M, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_gradients_are_those_of_the_full_logits(
    chunk_positions: int, temperature: float
) -> None:
    hidden, weight, bias = random_head()
    upstream_M = torch.linspace(-1, 2, M)
    scores = token_scores(
        hidden, weight, targets(), bias_V=bias, temperature=temperature, chunk_positions=chunk_positions
    )
    (scores.log_prob_M * upstream_M).sum().backward()

    exact, logits, expected_M = by_full_logits(upstream_M, temperature, hidden, weight, bias)
    torch.testing.assert_close(scores.log_prob_M.double(), expected_M, rtol=0, atol=1e-5)
    for ours, reference in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-5, atol=2e-5)
    assert torch.equal(scores.correct_M, logits.argmax(1) == targets())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_products_in_matrix_units_lose_nothing(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's way, its products computed here in float32: as near to float64 as float32 copies are."""
    monkeypatch.setattr(head, "multiplies_as_stored", lambda *_: True)
    hidden, weight, bias = random_head(torch.bfloat16)
    upstream_M = torch.linspace(-1, 2, M)
    scores = token_scores(hidden, weight, targets(), bias_V=bias, temperature=temperature, chunk_positions=8)
    (scores.log_prob_M * upstream_M).sum().backward()

    exact, _, expected_M = by_full_logits(upstream_M, temperature, hidden, weight, bias)
    torch.testing.assert_close(scores.log_prob_M.double(), expected_M, rtol=0, atol=1e-5)
    for ours, reference in zip((hidden, weight, bias), exact, strict=True):
        # One rounding to bfloat16 at the very end: 2^-8 relative.
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=2**-8, atol=1e-4)


def test_two_bfloat16_halves_keep_sixteen_bits_of_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 2^-12 is lost in bfloat16, and is what this weight's gradient is a multiple of."""
    monkeypatch.setattr(head, "multiplies_as_stored", lambda *_: True)
    logits = head.Logits(torch.ones(1, 2).bfloat16(), Head(torch.ones(3, 2).bfloat16()), size=1)
    gradients = head.Gradients(logits, (True, True, False))
    gradients.add(slice(0, 1), torch.full((1, 3), 1 + 2**-12))
    assert gradients.weight_VD is not None and gradients.hidden_MD is not None
    assert torch.equal(gradients.weight_VD, torch.full((3, 2), 1 + 2**-12))
    assert torch.equal(gradients.hidden_MD, torch.full((1, 2), 3 * (1 + 2**-12)))


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight, _ = random_head()
    weight.requires_grad_(False)
    token_scores(hidden, weight, targets()).log_prob_M.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_bfloat16_is_within_a_hundredth_of_a_nat_where_plain_bfloat16_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=generator).bfloat16()
    weight = (0.5 * torch.randn(4096, 64, generator=generator)).bfloat16()
    target = torch.randint(4096, (256,), generator=generator)
    exact_M = -F.cross_entropy(hidden.double() @ weight.double().t(), target, reduction="none")
    ours_M = token_scores(hidden, weight, target).log_prob_M
    plain_M = -F.cross_entropy(hidden @ weight.t(), target, reduction="none")
    assert ours_M.dtype == torch.float32
    assert (ours_M - exact_M).abs().max() < 1e-4
    assert (plain_M - exact_M).abs().max() > 0.01


def test_bfloat16_gradients_come_back_in_bfloat16() -> None:
    hidden, weight, bias = random_head(torch.bfloat16)
    token_scores(hidden, weight, targets(), bias_V=bias).log_prob_M.sum().backward()
    exact = as_float64(hidden, weight, bias)
    F.cross_entropy(exact[0] @ exact[1].t() + exact[2], targets(), reduction="sum").neg().backward()
    for ours, reference in zip((hidden, weight, bias), exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        # One rounding to bfloat16 at the very end: 2^-8 relative.
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=2**-8, atol=1e-4)


def test_entropies_of_a_uniform_distribution() -> None:
    # 32 equally likely tokens: ln 32; renormalised over any 20 of them: ln 20.
    scores = token_scores(torch.ones(3, 1), torch.ones(32, 1), torch.tensor([0, 1, 2]), statistics=True)
    assert scores.entropy_M.tolist() == pytest.approx([math.log(32)] * 3)
    assert scores.top_entropy_M.tolist() == pytest.approx([math.log(20)] * 3)
    assert scores.log_prob_M.tolist() == pytest.approx([-math.log(32)] * 3)


def test_entropies_match_full_logits_and_carry_no_gradient() -> None:
    hidden, weight, bias = random_head()
    scores = token_scores(hidden, weight, targets(), bias_V=bias, statistics=True, chunk_positions=5)
    logits = (hidden.double() @ weight.double().t() + bias.double()).detach()
    for ours, values in (
        (scores.entropy_M, logits),
        (scores.top_entropy_M, logits.sort(1, descending=True).values[:, :20]),
    ):
        expected_M = torch.distributions.Categorical(logits=values).entropy()
        torch.testing.assert_close(ours.double(), expected_M, rtol=0, atol=1e-5)
        assert not ours.requires_grad


def test_no_positions_at_all() -> None:
    hidden, weight, _ = random_head()
    scores = token_scores(hidden[:0], weight, targets()[:0], statistics=True)
    scores.log_prob_M.sum().backward()
    assert scores.log_prob_M.shape == (0,) and not weight.grad.any()


# pi_0 = (.5, .5), pi = (.9, .1): forward .5 ln(.25/.09) = .510826, reverse .9 ln 1.8 + .1 ln .2 = .368064
@pytest.mark.parametrize(("direction", "nats"), [("forward", 0.510826), ("reverse", 0.368064)])
def test_kl_of_two_tokens(direction: KlDirection, nats: float) -> None:
    one = torch.ones(1, 1)
    policy = Head(torch.tensor([[0.9], [0.1]]).log())
    start = Head(torch.tensor([[0.5], [0.5]]).log())
    assert token_kl(one, policy, one, start, direction=direction).item() == pytest.approx(nats, abs=1e-6)
    assert token_kl(one, policy, one, policy, direction=direction).item() == 0.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk_positions", [8, None])
def test_kl_and_its_gradients_are_those_of_the_full_logits(
    direction: KlDirection, chunk_positions: int
) -> None:
    policy, start = random_head(seed=0), random_head(seed=5)
    upstream_M = torch.linspace(-1, 2, M)
    kl_M = token_kl(
        policy[0],
        Head(policy[1], policy[2], scale=0.5),
        start[0],
        Head(start[1], start[2], scale=0.25),
        direction=direction,
        chunk_positions=chunk_positions,
    )
    (kl_M * upstream_M).sum().backward()

    exact = as_float64(*policy)
    log_policy = F.log_softmax(0.5 * (exact[0] @ exact[1].t() + exact[2]), dim=1)
    fixed = as_float64(*start)
    log_start = F.log_softmax(0.25 * (fixed[0] @ fixed[1].t() + fixed[2]), dim=1).detach()
    first, second = (log_start, log_policy) if direction == "forward" else (log_policy, log_start)
    expected_M = (first.exp() * (first - second)).sum(1)
    (expected_M * upstream_M).sum().backward()

    torch.testing.assert_close(kl_M.double(), expected_M, rtol=1e-5, atol=1e-5)
    for ours, reference in zip(policy, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=2e-5)
    assert all(tensor.grad is None for tensor in start)


MEASURE = """
import resource, torch
from modeseek_ray.objectives.logprobs import token_scores
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
hidden = torch.randn(1024, 32, requires_grad=True)
weight = torch.randn(131072, 32, requires_grad=True)
token_scores(hidden[:1], weight[:64], torch.zeros(1, dtype=torch.long)).log_prob_M.sum().backward()
hidden.grad = weight.grad = None
before = peak()
token_scores(hidden, weight, torch.arange(1024)).log_prob_M.sum().backward()
print(peak() - before)
"""


def test_memory_of_a_large_vocabulary() -> None:
    # The logits alone would be 1024 x 131072 x 4 B = 512 MiB, plain autograd holds them three times.
    # Ours: one chunk (64 MiB), the weight's gradient (16 MiB) and working space.
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 200


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_alone_is_that_of_the_full_logits(temperature: float) -> None:
    hidden, weight, bias = random_head()
    scores = token_scores(
        hidden, weight, targets(), bias_V=bias, temperature=temperature, entropy=True, chunk_positions=5
    )
    exact = as_float64(hidden, weight, bias)
    logits = (exact[0] @ exact[1].t() + exact[2]) / temperature
    expected_M = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropy_M.double(), expected_M, rtol=0, atol=2e-6)
    assert scores.top_entropy_M is None
    assert not scores.entropy_M.requires_grad
    plain = token_scores(hidden, weight, targets(), bias_V=bias, temperature=temperature, chunk_positions=5)
    assert torch.equal(plain.log_prob_M, scores.log_prob_M), "asking for it changes no bit of the others"


def test_both_directions_of_kl_at_once() -> None:
    """METHODS.md section 5: forward .510826, reverse .368064; and against the one-direction function."""
    start = Head(torch.zeros(2, 1))
    policy = Head(torch.tensor([[math.log(9.0)], [0.0]]))
    forward_M, reverse_M = token_kls(torch.ones(1, 1), policy, torch.ones(1, 1), start)
    assert (forward_M.item(), reverse_M.item()) == pytest.approx((0.510826, 0.368064), abs=1e-6)
    hidden, weight, bias = (t.detach() for t in random_head())
    other = random_head(seed=2)
    heads = Head(weight, bias, 0.5), Head(other[1].detach(), other[2].detach(), 0.5)
    found = token_kls(hidden, heads[0], other[0].detach(), heads[1], chunk_positions=5)
    for kl_M, direction in zip(found, ("forward", "reverse"), strict=True):
        expected_M = token_kl(hidden, heads[0], other[0].detach(), heads[1], direction=direction)
        torch.testing.assert_close(kl_M, expected_M)
