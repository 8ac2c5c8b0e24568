"""Clipped token ratios: METHODS.md's numbers, the surrogate they come from, and sums of statistics."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from modeseek_ray.objectives.deltas import FIGURES, DeltaSums, ratio_warnings
from modeseek_ray.objectives.ratios import clip_factor, delta_sums, mismatch_factor
from modeseek_ray.types import Mismatch, RatioClip

ONE = (torch.tensor([0]), torch.tensor([1]))  # one sample of one token


def log_of(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log().float()


@pytest.mark.parametrize(
    ("scheme", "ratio", "value", "expected"),
    [
        ("ppo", 0.5, 1.0, 0.5),
        ("clamp", 0.5, 1.0, 0.8),
        ("ppo", 1.3, 1.0, 0.0),
        ("clamp", 1.3, 1.0, 1.27),
        ("ppo", 1.2, 1.0, 1.2),
        # v < 0: pushing down. The lower bound binds, the upper never does.
        ("ppo", 0.5, -1.0, 0.0),
        ("ppo", 1.3, -1.0, 1.3),
        ("clamp", 0.5, -1.0, 0.8),
        ("ppo", 0.81, -1.0, 0.81),
        ("ppo", 1.3, 0.0, 0.0),
    ],
)
def test_staleness_clip_of_one_token(scheme: str, ratio: float, value: float, expected: float) -> None:
    found = clip_factor(log_of(ratio), torch.tensor([value]), *ONE, RatioClip(scheme))  # type: ignore[arg-type]
    assert found.factor_M.item() == pytest.approx(expected, abs=1e-6)
    assert (bool(found.low_M), bool(found.high_M)) == (
        expected != pytest.approx(ratio) and ratio < 1,
        expected != pytest.approx(ratio) and ratio > 1,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ppo_is_the_gradient_of_the_clipped_surrogate(level: str) -> None:
    """min(rho A, clamp(rho) A) by autograd; at sequence level rho is exp(mean log rho) for all its tokens."""
    generator = torch.Generator().manual_seed(0)
    sample_M = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    num_tokens_B = torch.bincount(sample_M)
    advantage_B = torch.tensor([1.5, -0.5, -2.0, 0.7], dtype=torch.float64)
    for _ in range(20):
        log_ratio_M = 0.4 * torch.randn(7, generator=generator, dtype=torch.float64)
        leaf_M = log_ratio_M.clone().requires_grad_()
        if level == "token":
            ratio, advantage, share = leaf_M.exp(), advantage_B[sample_M], torch.ones(7)
        else:
            mean_B = torch.zeros(4, dtype=torch.float64).index_add(0, sample_M, leaf_M) / num_tokens_B
            ratio, advantage, share = mean_B.exp(), advantage_B, 1 / num_tokens_B[sample_M]
        torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.27) * advantage).sum().backward()  # type: ignore[no-untyped-call]
        clip = RatioClip("ppo", level=level)  # type: ignore[arg-type]
        factor_M = clip_factor(log_ratio_M, advantage_B[sample_M], sample_M, num_tokens_B, clip).factor_M
        torch.testing.assert_close(advantage_B[sample_M] * factor_M * share, leaf_M.grad)


def test_on_policy_the_factor_is_exactly_one() -> None:
    log_prob_M = -5 * torch.rand(1000)
    sample_M = torch.arange(1000) // 7
    num_tokens_B = torch.bincount(sample_M)
    for scheme, level in itertools.product(("ppo", "clamp"), ("token", "sequence")):
        clip = RatioClip(scheme, level=level)  # type: ignore[arg-type]
        found = clip_factor(log_prob_M - log_prob_M, torch.randn(1000), sample_M, num_tokens_B, clip)
        assert torch.equal(found.factor_M, torch.ones(1000))


@pytest.mark.parametrize(
    ("mismatch", "ratio", "expected"),
    [
        (Mismatch("tis", high=2.0), 3.0, 2.0),
        (Mismatch("tis", high=2.0), 0.1, 0.1),  # truncated above alone
        (Mismatch("mis", low=0.5, high=5.0), 6.0, 0.0),
        (Mismatch("mis", low=0.5, high=5.0), 0.4, 0.0),
        (Mismatch("mis", low=0.5, high=5.0), 3.0, 3.0),
    ],
)
def test_mismatch_of_one_token(mismatch: Mismatch, ratio: float, expected: float) -> None:
    factor_M = mismatch_factor(log_of(ratio), *ONE, mismatch).factor_M
    assert factor_M.item() == pytest.approx(expected, abs=1e-6)


def test_a_sequence_has_the_geometric_mean_of_its_ratios() -> None:
    """(4, 1) -> 2 for both tokens, (9, 1, 1/9) -> 1; a sample of an unknown sampler counts as it is."""
    log_ratio_M = torch.cat([log_of(4.0, 1.0, 9.0, 1.0, 1 / 9), torch.tensor([torch.nan])])
    sample_M = torch.tensor([0, 0, 1, 1, 1, 2])
    found = mismatch_factor(
        log_ratio_M, sample_M, torch.tensor([2, 3, 1]), Mismatch("mis", 0.5, 1.9, level="sequence")
    )
    torch.testing.assert_close(found.factor_M, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert found.high_M.tolist() == [True, True, False, False, False, False]


def test_statistics_a_person_can_work_out() -> None:
    """Ratios (1.5, .5) and (1.1, 1.2): METHODS.md's two examples of what first order makes of a sample."""
    log_ratio_M = torch.cat([log_of(1.5, 0.5, 1.1, 1.2), torch.tensor([torch.nan])])
    sample_M = torch.tensor([0, 0, 1, 1, 2])
    clip = clip_factor(log_ratio_M[:4], torch.ones(4), sample_M[:4], torch.tensor([2, 2]), RatioClip())
    figures = delta_sums(log_ratio_M, sample_M, 3, clip).figures("ratio")
    assert set(figures) == {f"ratio/{name}" for name in FIGURES}
    expected = {
        "mean_abs_delta": 1.3 / 4,
        "max_abs_delta": 0.5,
        "std_delta": math.sqrt(0.55 / 4 - (0.3 / 4) ** 2),
        "mean_abs_sum_delta": 0.3 / 2,  # 1.0 by first order, though .75 is exact: sum delta says nothing
        "max_abs_sum_delta": 0.3,
        "mean_sum_squared_delta": 0.55 / 2,
        "max_sum_squared_delta": 0.5,
        "far_samples": 0.0,
        "clipped_low": 0.0,
        "clipped_high": 0.25,
        "chi_squared": 0.55 / 4,
        "kl_k3": (0.3 - math.log(1.5 * 0.5 * 1.1 * 1.2)) / 4,
    }
    for name, value in expected.items():
        assert figures[f"ratio/{name}"] == pytest.approx(value, abs=1e-6), name


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    sample_M = torch.sort(torch.randint(6, (60,), generator=generator)).values
    log_ratio_M = torch.randn(60, generator=generator)
    clip = clip_factor(log_ratio_M, torch.ones(60), sample_M, torch.bincount(sample_M), RatioClip("clamp"))
    whole = delta_sums(log_ratio_M, sample_M, 6, clip)
    parts = [DeltaSums()]
    for low, high in ((0, 1), (1, 4), (4, 6)):
        part_M = (sample_M >= low) & (sample_M < high)
        part = type(clip)(*(column[part_M] for column in clip))
        parts.append(delta_sums(log_ratio_M[part_M], sample_M[part_M] - low, high - low, part))
    merged = sum(parts, DeltaSums()).figures("x")
    assert merged == pytest.approx(whole.figures("x"), rel=1e-12)
    assert whole.num_over_two > 0 and whole.num_far > 0 and whole.num_clipped_low > 0


def test_k3_is_the_kl_of_the_sampler_to_the_trainer() -> None:
    """Tokens in the sampler's own proportions (.5, .5); the trainer's are (.9, .1): KL .510826."""
    log_ratio_M = log_of(0.9 / 0.5, 0.1 / 0.5)
    figures = delta_sums(log_ratio_M, torch.tensor([0, 0]), 1).figures("mismatch")
    assert figures["mismatch/kl_k3"] == pytest.approx(0.510826, abs=1e-5)
    assert figures["mismatch/chi_squared"] == pytest.approx(0.64, abs=1e-6)  # E_q[(p/q)^2] - 1
    assert figures["mismatch/over_two"] == 0.5


def test_warnings_name_the_ratio_the_figure_and_the_mend() -> None:
    calm = delta_sums(log_of(1.1, 0.9), torch.tensor([0, 0]), 1)
    wild = delta_sums(log_of(1.9, 1.9), torch.tensor([0, 0]), 1)
    assert ratio_warnings({**calm.figures("ratio"), **calm.figures("mismatch")}) == ()
    [warning] = ratio_warnings({**calm.figures("ratio"), **wild.figures("mismatch")})
    assert warning.startswith("mismatch: the mean |δ| of a token is 0.9, the mean |Σδ| of a sample is 1.8")
    assert "routing_replay" in warning


def test_the_driver_may_read_figures_without_torch() -> None:
    code = "import sys, modeseek_ray.objectives.deltas; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
