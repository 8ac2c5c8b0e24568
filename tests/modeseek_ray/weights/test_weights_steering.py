"""Drawing prompts by what the weights say of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modeseek_ray.weights import PromptLedger, draw_prompts, prompt_probabilities

# Mean weights 1/4, 1 (not seen yet) and 4.
LEDGER = PromptLedger.empty(3).add(np.array([0, 0, 2]), np.array([0.0, 0.5, 4.0]))


@pytest.mark.parametrize(
    ("strength", "steering", "expected"),
    [
        (0.0, "low_is_unmastered", [1 / 3, 1 / 3, 1 / 3]),
        (1.0, "low_is_unmastered", [16 / 21, 4 / 21, 1 / 21]),  # 4 : 1 : 1/4
        (1.0, "low_is_mastered", [1 / 21, 4 / 21, 16 / 21]),
        (0.5, "low_is_unmastered", [1 / 6 + 8 / 21, 1 / 6 + 2 / 21, 1 / 6 + 1 / 42]),
    ],
)
def test_chances_by_hand(strength: float, steering: str, expected: list[float]) -> None:
    np.testing.assert_allclose(prompt_probabilities(LEDGER, strength, steering), expected)  # type: ignore[arg-type]


def test_draws_follow_the_chances_and_repeat_with_the_generator() -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([draw_prompts(LEDGER, 1, rng, 1.0) for _ in range(4000)])
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [16 / 21, 4 / 21, 1 / 21], atol=0.03)
    again = np.random.default_rng(0)
    assert [int(draw_prompts(LEDGER, 1, again, 1.0)[0]) for _ in range(50)] == drawn[:50].tolist()


def test_a_batch_has_different_prompts_and_more_than_all_go_round_again() -> None:
    drawn = draw_prompts(LEDGER, 8, np.random.default_rng(1), 0.9)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]
    assert len(set(drawn[6:].tolist())) == 2


def test_a_prompt_that_weighs_nothing_is_still_drawn() -> None:
    ledger = PromptLedger.empty(2).add(np.array([0, 1]), np.array([0.0, 1e9]))
    np.testing.assert_allclose(prompt_probabilities(ledger, 1.0, "low_is_mastered"), [1 / 101, 100 / 101])


def test_the_ledger_survives_a_checkpoint_and_is_not_changed() -> None:
    before = LEDGER.sum_P.copy()
    more = LEDGER.add(np.array([1]), np.array([-2.0]))  # a signed advantage: as heavy either way
    np.testing.assert_array_equal(LEDGER.sum_P, before)
    restored = PromptLedger.of_state(json.loads(json.dumps(more.state())))
    np.testing.assert_array_equal(restored.mean_P, [0.25, 2.0, 4.0])


def test_an_impossible_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="strength"):
        draw_prompts(LEDGER, 1, np.random.default_rng(0), 1.5)
