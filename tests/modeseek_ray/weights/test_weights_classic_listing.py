"""The classic listing of mode-seeking SFT, rendered plainly in PyTorch, gives the same weights and direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from modeseek_ray.weights import Evidence, Weighting, weigh


def classic_weights(log_w: Tensor, floor: float, most: float) -> tuple[Tensor, float]:
    """softmax(gamma log w), gamma the largest with ESS/n >= floor by 60 bisections."""

    def ess_share(gamma: float) -> float:
        weights = torch.softmax(gamma * log_w, dim=0)
        return (1 / (weights.square().sum() * len(log_w))).item()

    low, high = 0.0, most
    if ess_share(high) >= floor:
        low = high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ess_share(middle) >= floor else (low, middle)
    return torch.softmax(low * log_w, dim=0), low


class Bigram(torch.nn.Module):
    """log pi(y) of a sequence: sum over its tokens of a table's log-softmax."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(11, 11, generator=generator, dtype=torch.float64))

    def forward(self, sequences: list[Tensor]) -> Tensor:
        log_probs = torch.log_softmax(self.table, dim=-1)
        return torch.stack([log_probs[s[:-1], s[1:]].sum() for s in sequences])


@pytest.mark.parametrize("floor", [0.3, 0.5, 0.8])
def test_same_weights_and_a_parallel_gradient(floor: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(11, (int(length),), generator=generator)
        for length in torch.randint(2, 12, (64,), generator=generator)
    ]
    policy, start = Bigram(2), Bigram(3)
    log_policy = policy(sequences)
    with torch.no_grad():
        log_reference = start(sequences)

    classic, gamma = classic_weights((log_policy - log_reference).detach(), floor, most=2.0)
    (classic_gradient,) = torch.autograd.grad(-(classic * log_policy).sum(), policy.table, retain_graph=True)

    num_tokens = np.array([len(s) - 1 for s in sequences])
    setting = {
        "likelihood": {
            "scheme": "ratio_power",
            "length_exponent": 0.0,
            "gamma": {"ess": {"floor": floor, "max": 2.0, "warmup": 0.0}},
        },
        "guards": {"cap": None},
    }
    weights = weigh(
        Evidence(log_policy.detach().numpy(), log_reference.numpy(), num_tokens),
        Weighting.model_validate(setting),
    )
    values = torch.from_numpy(weights.values_N)
    (gradient,) = torch.autograd.grad(-(values * log_policy).sum() / num_tokens.sum(), policy.table)

    assert weights.gamma == pytest.approx(gamma, abs=1e-9)
    torch.testing.assert_close(values / 64, classic, rtol=1e-9, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), classic_gradient.flatten(), dim=0)
    assert cosine > 1 - 1e-9
    # Mean-length times larger is the listing: 64 / trained tokens lies between them.
    torch.testing.assert_close(classic_gradient * 64 / num_tokens.sum(), gradient, rtol=1e-8, atol=1e-12)
