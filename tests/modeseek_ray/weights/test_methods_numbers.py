"""Every number that METHODS.md prints in italics, and the test that holds the code to it.

A number that is added there without a test, or a test that is renamed, fails here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
METHODS = (ROOT / "modeseek_ray" / "weights" / "METHODS.md").read_text()
HERE, OBJECTIVES = "tests/modeseek_ray/weights/", "tests/modeseek_ray/objectives/"
FORMS = HERE + "test_weights_closed_forms.py"
POINTS = HERE + "test_weights_fixed_points.py"

# How the number begins -> file and test. Those of section 2's table have no italics and come last.
TESTS = {
    "w = (.5, 1.5), floor .8": (FORMS, "test_linear_has_its_own_solve"),
    "L = (0,1), floor .8, max 2": (FORMS, "test_ess_floor_on_two_rows_is_ln_3"),
    "Equal inputs to the weighing": (FORMS, "test_plain_sft_is_exactly_one"),
    "Adding a constant to L": (
        HERE + "test_weights_properties.py",
        "test_a_shift_changes_no_gamma_per_sample",
    ),
    "(σ², δ) = (.5, 1)": (FORMS, "test_bias_variance"),
    "(0,1) and (10,11)": (FORMS, "test_a_shift_of_a_group_changes_nothing"),
    "α=1, β=2": (FORMS, "test_alpha"),
    "r = (0,0,0,1)": (FORMS, "test_advantage"),
    "n=4, N=2": (FORMS, "test_best_of_n"),
    "r = (0,1), floor .8 → β": (FORMS, "test_beta_of_two_rows"),
    "With exact fits only": (POINTS, "test_only_the_sum_of_inverse_betas_matters"),
    "φ ∈ {0,4}": (FORMS, "test_solver_in_feature_space"),
    "ρ = .5, A = 1": (OBJECTIVES + "test_ratios.py", "test_staleness_clip_of_one_token"),
    "ratios 1.1, 1.2": (FORMS, "test_exact_and_first_order"),
    "ratios 1.5, .5": (FORMS, "test_exact_and_first_order"),
    "π_0 = (.5,.5), π = (.9,.1)": (OBJECTIVES + "test_logprobs.py", "test_kl_of_two_tokens"),
    "Router scores (2,1,0)": (
        "tests/modeseek_ray/routing/test_gates.py",
        "test_the_two_orders_of_softmax_and_choice",
    ),
    "(.295858, .372781, .331361)": (POINTS, "test_ratio_powers"),
    "(.301341, .372069, .326590)": (POINTS, "test_self_normalisation_biases_sampled_batches"),
    "groups (0,1) and (0,5): 2.97": (FORMS, "test_one_beta_for_two_groups"),
}
EMPHASIS = {"farthest", "Staleness", "Mismatch", "data", "b", "u"}  # words, not numbers


def italics() -> list[str]:
    """Texts between single asterisks; asterisks of lists, bold type, code and γ* are none."""
    text = re.sub(
        r"`[^`]*`|\*\*|^\* |γ\*|θ\*", lambda m: m[0] if m[0][0] == "`" else "", METHODS, flags=re.MULTILINE
    )
    return [found for found in re.findall(r"\*([^*\n]+)\*", text) if found not in EMPHASIS]


def test_every_number_in_italics_has_a_test() -> None:
    for text in italics():
        assert [start for start in TESTS if text.startswith(start)], f"METHODS.md: {text!r} has no test"
    assert len(italics()) >= 17


@pytest.mark.parametrize("start", TESTS)
def test_the_test_of_each_number_exists(start: str) -> None:
    file, test = TESTS[start]
    assert start in METHODS
    assert f"def {test}(" in (ROOT / file).read_text()
