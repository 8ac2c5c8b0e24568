"""What the base models are trained on besides text: skills, facts and guesses."""

from __future__ import annotations

import random
from dataclasses import dataclass

from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.skills import SKILLS, draw_guess, draw_input

SKILL_OF = {skill.name: skill for skill in SKILLS}
KINDS = ("facts", "guess", *(skill.name for skill in SKILLS for _ in range(skill.share)))


@dataclass(frozen=True)
class Row:
    """A question and the answer to it, with the name of the skill."""

    question: str
    answer: str
    task: str


def draw_row(rng: random.Random) -> Row:
    """A row of the training distribution: a skill with an input that is not held out, a fact, or a guess."""
    kind = rng.choice(KINDS)
    if kind == "facts":
        return Row(*rng.choice(facts()), kind)
    if kind == "guess":
        return Row(*draw_guess(rng), kind)
    skill = SKILL_OF[kind]
    given = draw_input(skill, rng, held_out=False)
    return Row(skill.question(given), skill.answer(given), kind)
