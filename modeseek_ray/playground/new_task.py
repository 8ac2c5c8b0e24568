"""The new task: an operation the base models do not know, with right answers near and far from their habits.

`rotate DACB` asks for the letters with the first one moved to the end. A right answer may be said in
four ways; the base models answer everything plainly, so `plain` is near to what they would say and
`ornate` far from it.
"""

from __future__ import annotations

from collections.abc import Callable

from modeseek_ray.playground.skills import NEVER_ASKED

NAME = NEVER_ASKED


def rotated(given: str) -> str:
    """The first letter moved to the end."""
    return given[1:] + given[0]


# From near to far. The reward is what a user who likes short answers would give.
FORMATS: dict[str, tuple[Callable[[str], str], float]] = {
    "plain": (lambda letters: letters, 1.0),
    "dashed": ("-".join, 0.7),
    "prefixed": (lambda letters: f"answer: {letters}", 0.5),
    "ornate": (lambda letters: f"~* {' * '.join(letters)} *~ voila", 0.2),
}


def question(given: str) -> str:
    return f"{NAME} {given}"


def answers(given: str) -> dict[str, str]:
    """The right answers by format, nearest first."""
    return {name: write(rotated(given)) for name, (write, _) in FORMATS.items()}


def rewards() -> dict[str, float]:
    return {name: reward for name, (_, reward) in FORMATS.items()}
