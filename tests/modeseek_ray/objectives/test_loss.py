"""The weighted loss: sums, one division, no gradient through weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modeseek_ray.objectives.loss import sum_by_sample, weighted_loss_sum

# Two samples of two and one tokens, log p = -1, -3, -2.
LOG_PROB_M = torch.tensor([-1.0, -3.0, -2.0])
SAMPLE_M = torch.tensor([0, 0, 1])
NUM_TOKENS_N = torch.tensor([2, 1])


@pytest.mark.parametrize(
    ("aggregation", "values", "factor", "denominator", "expected"),
    [
        ("token", [1.0, 1.0], None, 3.0, 2.0),  # 6 / 3
        ("token", [0.5, 1.5], None, 3.0, 5 / 3),  # (.5 * 4 + 1.5 * 2) / 3
        ("token", [1.0, 1.0], [1.0, 0.0, 0.5], 3.0, 2 / 3),  # (1 + 0 + 1) / 3: still three tokens
        ("sequence", [1.0, 1.0], None, 2.0, 2.0),  # (4/2 + 2/1) / 2
        ("sequence", [0.5, 1.5], None, 2.0, 2.0),  # (.5 * 2 + 1.5 * 2) / 2
    ],
)
def test_worked_examples(aggregation, values, factor, denominator, expected) -> None:  # type: ignore[no-untyped-def]
    loss = weighted_loss_sum(
        LOG_PROB_M,
        SAMPLE_M,
        torch.tensor(values),
        None if factor is None else torch.tensor(factor),
        NUM_TOKENS_N,
        aggregation,
        denominator,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_unit_weights_give_the_gradient_of_cross_entropy_bit_for_bit() -> None:
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9) % 7
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    log_prob_M = -F.cross_entropy(ours, target, reduction="none")
    sample_M = torch.arange(9) // 3
    weighted_loss_sum(log_prob_M, sample_M, torch.ones(3), None, torch.full((3,), 3), "token", 8.0).backward()
    (F.cross_entropy(theirs, target, reduction="sum") / 8.0).backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_no_gradient_through_weights_and_factors() -> None:
    log_prob_M = LOG_PROB_M.clone().requires_grad_()
    values_N = torch.tensor([0.5, 1.5], requires_grad=True)
    factor_M = log_prob_M.exp()
    weighted_loss_sum(log_prob_M, SAMPLE_M, values_N, factor_M, NUM_TOKENS_N, "token", 3.0).backward()
    assert values_N.grad is None
    # d loss / d log p = -v c / D, and nothing from c's own dependence on log p.
    expected_M = -torch.tensor([0.5, 0.5, 1.5]) * LOG_PROB_M.exp() / 3
    torch.testing.assert_close(log_prob_M.grad, expected_M)


def test_shares_of_micro_batches_add_up() -> None:
    values_N = torch.tensor([0.5, 1.5])
    whole = weighted_loss_sum(LOG_PROB_M, SAMPLE_M, values_N, None, NUM_TOKENS_N, "token", 3.0)
    parts = [
        weighted_loss_sum(
            LOG_PROB_M[(SAMPLE_M - i) == 0],
            torch.zeros(int(NUM_TOKENS_N[i]), dtype=torch.long),
            values_N[i : i + 1],
            None,
            NUM_TOKENS_N[i : i + 1],
            "token",
            3.0,
        )
        for i in range(2)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


def test_sums_by_sample_keep_float64_and_empty_samples() -> None:
    total_N = sum_by_sample(torch.tensor([1e8, 1.0, -2.0]), torch.tensor([0, 0, 2]), 3)
    assert total_N.tolist() == [100000001.0, 0.0, -2.0]  # float32 would lose the one
