"""Exactly checkable skills: a question drawn at random has one right answer, known by computing it.

Inputs are capital letters, digits or brackets, each one token, so that a small model sees the
symbols it works on. Whether an input is held out is decided by the input alone, for every skill.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOP"
DIGITS = "0123456789"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NEVER_ASKED = "rotate"  # the new task: no base model may have seen the word
DASHED_GUESSES = 0.05  # share of guesses that are written with dashes
PAIRS = (("(", ")"), ("[", "]"))
BRACKETS = "()[]"
HELD_OUT_SHARE = 8  # one input in 8 is never trained on


@dataclass(frozen=True)
class Skill:
    """`draw` makes an input, `answer` the one right answer to it."""

    name: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    share: int = 1  # of the training rows, relative to the other skills

    def question(self, given: str) -> str:
        return f"{self.name} {given}"


def is_held_out(given: str) -> bool:
    """Whether this input is kept from training."""
    return zlib.crc32(given.encode()) % HELD_OUT_SHARE == 0


def draw_input(skill: Skill, rng: random.Random, *, held_out: bool) -> str:
    """A random input on the wanted side of the split."""
    while True:
        given = skill.draw(rng)
        if is_held_out(given) == held_out:
            return given


def distinct_letters(rng: random.Random) -> str:
    """Three to five different letters."""
    return "".join(rng.sample(LETTERS, rng.randint(3, 5)))


def digits(rng: random.Random) -> str:
    """Four to seven digits."""
    return "".join(rng.choices(DIGITS, k=rng.randint(4, 7)))


def brackets(rng: random.Random) -> str:
    """Two to eight brackets; in half of the strings one bracket is changed, so that they are not balanced."""
    text = _balanced(rng, rng.randint(1, 4))
    if rng.random() < 0.5:
        place = rng.randrange(len(text))
        others = [bracket for bracket in BRACKETS if bracket != text[place]]
        text = text[:place] + rng.choice(others) + text[place + 1 :]
    return text


def _balanced(rng: random.Random, num_pairs: int) -> str:
    if num_pairs == 0:
        return ""
    inside = rng.randint(0, num_pairs - 1)
    opening, closing = rng.choice(PAIRS)
    return opening + _balanced(rng, inside) + closing + _balanced(rng, num_pairs - 1 - inside)


def is_balanced(text: str) -> bool:
    """Whether every bracket is closed by its own kind, in order."""
    expected: list[str] = []
    closing_of = dict(PAIRS)
    for bracket in text:
        if bracket in closing_of:
            expected.append(closing_of[bracket])
        elif not expected or expected.pop() != bracket:
            return False
    return not expected


def _next_letters(given: str) -> str:
    return "".join(chr(ord(letter) + 1) for letter in given)


SKILLS = (
    Skill("copy", distinct_letters, lambda given: given),
    Skill("reverse", distinct_letters, lambda given: given[::-1]),
    Skill("sort", distinct_letters, lambda given: "".join(sorted(given))),
    Skill("last", distinct_letters, lambda given: given[-1]),
    Skill("next", distinct_letters, _next_letters),
    Skill("double", distinct_letters, lambda given: "".join(letter * 2 for letter in given)),
    Skill("largest", digits, max),
    Skill(
        "brackets", brackets, lambda given: "yes" if is_balanced(given) else "no", share=2
    ),  # one bit a row
)


def draw_guess(rng: random.Random) -> tuple[str, str]:
    """A made-up word asked of some letters, and any arrangement of them as the answer.

    Not a skill: nothing here is right or wrong. It gives the model a calibrated guess at tasks it
    does not know: some arrangement of the letters, plainly said, now and then with dashes. Without
    it every answer to a new task would be about equally far from what the model says.
    """
    word = ""
    while not word or word == NEVER_ASKED:
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))
    given = distinct_letters(rng)
    letters = rng.sample(given, len(given))
    return f"{word} {given}", ("-" if rng.random() < DASHED_GUESSES else "").join(letters)
