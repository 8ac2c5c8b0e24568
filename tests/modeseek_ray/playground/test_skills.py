"""The skills are what they say, and the split depends on the input alone."""

from __future__ import annotations

import random
import re

import pytest

from modeseek_ray.playground import new_task
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.skills import SKILLS, draw_guess, draw_input, is_balanced, is_held_out

EXAMPLES = {
    "copy": ("DACB", "DACB"),
    "reverse": ("DACB", "BCAD"),
    "sort": ("DACB", "ABCD"),
    "last": ("DACB", "B"),
    "next": ("DACP", "EBDQ"),
    "double": ("DAC", "DDAACC"),
    "largest": ("3719", "9"),
    "brackets": ("[()]()", "yes"),
}


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_a_worked_example(skill):
    given, answer = EXAMPLES[skill.name]
    assert skill.answer(given) == answer
    assert skill.question(given) == f"{skill.name} {given}"


@pytest.mark.parametrize(
    ("text", "balanced"),
    [
        ("()", True),
        ("([])[]", True),
        ("(]", False),
        (")(", False),
        ("([)]", False),
        ("((", False),
        ("", True),
    ],
)
def test_balanced_brackets(text, balanced):
    assert is_balanced(text) is balanced


def test_brackets_are_balanced_half_of_the_time():
    skill = next(skill for skill in SKILLS if skill.name == "brackets")
    rng = random.Random(0)
    answers = [skill.answer(skill.draw(rng)) for _ in range(2000)]
    assert answers.count("yes") / 2000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
@pytest.mark.parametrize("held_out", [False, True])
def test_draws_stay_on_their_side_of_the_split(skill, held_out):
    rng = random.Random(1)
    assert all(is_held_out(draw_input(skill, rng, held_out=held_out)) is held_out for _ in range(200))


def test_a_guess_arranges_the_letters_and_never_asks_the_new_task():
    rng = random.Random(2)
    known = {skill.name for skill in SKILLS} | {new_task.NAME}
    dashed = 0
    for _ in range(2000):
        word, given = (guess := draw_guess(rng))[0].split(" ")
        assert sorted(guess[1].replace("-", "")) == sorted(given)
        assert word not in known
        dashed += "-" in guess[1]
    assert dashed / 2000 == pytest.approx(0.05, abs=0.02)


def test_facts_are_true_and_unambiguous():
    known = dict(facts())
    assert len(known) == len(facts()) == 48
    assert known["country code of Germany"] == "DEU"
    assert known["country code of Switzerland"] == "CHE"
    assert known["currency code of Yen"] == "JPY"
    assert all(re.fullmatch("[A-Z]{3}", answer) for answer in known.values())


def test_the_new_task_is_none_of_the_old_ones():
    assert new_task.rotated("DACB") == "ACBD"
    assert new_task.NAME not in {skill.name for skill in SKILLS}
    assert all(skill.answer("DACB") != "ACBD" for skill in SKILLS)


def test_every_format_is_a_right_answer_of_its_own():
    answers = new_task.answers("DAC")
    assert answers["plain"] == "ACD"
    assert answers["dashed"] == "A-C-D"
    assert len(set(answers.values())) == len(answers) == 4
    for answer in answers.values():
        assert "".join(re.findall("[A-Z]", answer)) == "ACD"


def test_rewards_fall_from_near_to_far():
    rewards = list(new_task.rewards().values())
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] == 1.0
    assert len(set(rewards)) == len(rewards)
