"""The graders that need no library: `string_check` and `length_penalty`."""

from __future__ import annotations

from collections.abc import Callable

from modeseek_ray.rewards.grader import GradeItem
from modeseek_ray.rewards.parameters import LengthPenalty, StringCheck
from modeseek_ray.rewards.template import parse_template

# (input, reference) -> does it hold?
OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    # casefold and not lower: "STRASSE" is "Straße".
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


def string_check(section: StringCheck) -> Callable[[GradeItem], float]:
    """1 or 0; both sides are compared as they are, white space included."""
    left, right = parse_template(section.input), parse_template(section.reference)
    holds = OPERATIONS[section.operation]

    def grade_one(item: GradeItem) -> float:
        return float(holds(left.render(item), right.render(item)))

    return grade_one


def length_penalty(section: LengthPenalty) -> Callable[[GradeItem], float]:
    """-penalty * clip((num_tokens - free) / (max - free), 0, 1)."""
    span = section.max_tokens - section.free_tokens

    def grade_one(item: GradeItem) -> float:
        share = (item.num_tokens - section.free_tokens) / span
        return -section.penalty * min(max(share, 0.0), 1.0) + 0.0  # + 0.0: no negative zero

    return grade_one
