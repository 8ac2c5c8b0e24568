"""What is learnt and what may be forgotten: base models, old-task probes, and the new task's files.

Everything is the playground's (its corpus, skills, facts, tokenizer, new task) at a size that one core
trains in seconds. PROTOCOL.md says what each variant is for.

    N  rows of a file
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modeseek_ray.objectives.model import ScoringModel
from modeseek_ray.playground import corpus, new_task
from modeseek_ray.playground.build import build
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.files import SHORT_ROTATE
from modeseek_ray.playground.mixture import draw_row
from modeseek_ray.playground.skills import SKILLS, Skill, distinct_letters, draw_input
from modeseek_ray.types import Sample
from tests.bench.forgetting.recipes import recipe_of

NEAR, MIDDLE, FAR = "plain", "dashed", "starred"
# The playground's ornate answer is as far, and four times as long: what a run costs.
FORMATS: dict[str, Callable[[str], str]] = {
    NEAR: new_task.FORMATS[NEAR][0],
    MIDDLE: new_task.FORMATS[MIDDLE][0],
    FAR: lambda letters: f"~* {letters} *~",
}
VARIANTS = ("standard", "rewards", "far", "noisy", "lengths")
PROMPTS = 640  # of a training file of demonstrations: 1,920 rows, 60 batches of 32
SAMPLED_PROMPTS, SAMPLES_PER_PROMPT = 320, 8  # of a training file of sampled answers
REPLAY_ROWS = 1024
WRONG_SHARE = 0.1
PROBED_PROMPTS, PROBED_ROWS, TEXT_BLOCKS, TEXT_LENGTH = 60, 12, 6, 64
ROTATE = Skill(new_task.NAME, distinct_letters, new_task.rotated)


@dataclass(frozen=True)
class Base:
    """A pre-trained model, as a directory and in memory, and its tokenizer. Never trained on: `fresh` copies."""

    arch: str
    seed: int
    directory: Path
    tokenizer: PreTrainedTokenizerFast
    model: torch.nn.Module

    @classmethod
    def of(cls, arch: str, seed: int, home: Path, *, progress: bool = True) -> Base:
        """Build it, or take what was built. Raises `ModelError` if an old task is not held."""
        recipe = recipe_of(arch, seed)
        directory = build(recipe.name, home, seed=seed, progress=progress, recipe=recipe)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return cls(arch, seed, directory, tokenizer, model.eval())

    def fresh(self) -> torch.nn.Module:
        """A causal language model to train."""
        return copy.deepcopy(self.model)

    def frozen(self) -> ScoringModel:
        """The start, to score and to measure KL against."""
        return ScoringModel(self.fresh()).requires_grad_(False).eval()


class Encoder:
    """Chat rows as `Sample`s, trained on the answer and its end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.end_id = int(tokenizer.eos_token_id)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def prompt(self, question: str) -> list[int]:
        return self.ids(f"<|user|>{question}<|end|><|assistant|>")

    def text(self, ids: Iterable[int]) -> str:
        """Of an answer's tokens, the end token left out."""
        return str(self._tokenizer.decode([i for i in ids if i != self.end_id]))

    def row(self, number: int, question: str, answer: str, *, task: str = "", problem: int = -1) -> Sample:
        return sample_of(
            number, self.prompt(question), [*self.ids(answer), self.end_id], task=task, problem=problem
        )


def sample_of(
    number: int, prompt: Sequence[int], answer: Sequence[int], *, task: str = "", problem: int = -1
) -> Sample:
    """One row, trained on all of `answer`."""
    trained_T = np.zeros(len(prompt) + len(answer), dtype=np.bool_)
    trained_T[len(prompt) :] = True
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return Sample(row=number, token_ids_T=ids, trained_T=trained_T, task=task, problem=problem)


def right_answers(given: str, variant: str) -> dict[str, str]:
    """The answers that count as success, nearest first."""
    answers = {name: write(new_task.rotated(given)) for name, write in FORMATS.items()}
    if variant == "rewards":
        return {NEAR: answers[NEAR]}
    if variant == "far":
        return {FAR: answers[FAR]}
    if variant == "lengths":
        return {**answers, FAR: new_task.answers(given)["ornate"]}
    return answers


def training_file(base: Base, variant: str, data_seed: int) -> list[Sample]:
    """The rows a run trains on, replay aside; the same bytes for the same base, variant and seed."""
    encoder = Encoder(base.tokenizer)
    if variant == "rewards":
        return _sampled_file(base, encoder, data_seed)
    rng = random.Random(f"train {data_seed}")  # standard, noisy and lengths ask the same questions
    rows = []
    for group, given in enumerate(_distinct(ROTATE, rng, PROMPTS, held_out=False)):
        answers = right_answers(given, variant)
        if variant == "noisy" and group < WRONG_SHARE * PROMPTS:
            answers = _wrong_answers(given, rng)
        for name, answer in answers.items():
            row = encoder.row(len(rows), new_task.question(given), answer, task=name)
            rows.append(replace(row, problem=group))
    return rows


def replay_file(base: Base, data_seed: int, first_row: int) -> list[Sample]:
    """Rows of the mixture the base was trained on, numbered from `first_row`."""
    encoder, rng = Encoder(base.tokenizer), random.Random(f"replay {data_seed}")
    drawn = [draw_row(rng) for _ in range(REPLAY_ROWS)]
    rows = [
        encoder.row(first_row + i, row.question, row.answer, task=row.task) for i, row in enumerate(drawn)
    ]
    return [replace(row, is_replay=True) for row in rows]


def old_tasks(base: Base) -> list[Sample]:
    """Held-out rows of every skill, all facts, and windows of held-out text (task `text`)."""
    encoder, rng = Encoder(base.tokenizer), random.Random("old tasks")
    asked = [
        (skill.question(given), skill.answer(given), skill.name)
        for skill in SKILLS
        for given in _distinct(skill, rng, PROBED_ROWS, held_out=True)
    ]
    asked += [(question, answer, "facts") for question, answer in facts()]
    rows = [encoder.row(i, question, answer, task=task) for i, (question, answer, task) in enumerate(asked)]
    documents = corpus.held_out_documents()[: 2 * TEXT_BLOCKS]
    stream = [i for document in documents for i in [*encoder.ids(document), encoder.end_id]]
    for block in range(TEXT_BLOCKS):
        ids = stream[block * TEXT_LENGTH : (block + 1) * TEXT_LENGTH]
        rows.append(sample_of(len(rows), ids[:1], ids[1:], task="text"))
    return rows


def new_problems(base: Base, variant: str) -> list[Sample]:
    """Held-out questions with every right answer; `problem` tells them apart, `task` the format."""
    encoder = Encoder(base.tokenizer)
    rows = []
    for problem, given in enumerate(_probed(variant)):
        for name, answer in right_answers(given, variant).items():
            row = encoder.row(len(rows), new_task.question(given), answer, task=name, problem=problem)
            rows.append(row)
    return rows


def probed_prompts(base: Base, variant: str) -> list[list[int]]:
    """The held-out questions of `new_problems`, as tokens."""
    encoder = Encoder(base.tokenizer)
    return [encoder.prompt(new_task.question(given)) for given in _probed(variant)]


def training_questions(data_seed: int) -> list[str]:
    """Letters of the questions that sampled answers, and online rounds, are about."""
    rng = random.Random(f"questions {data_seed}")
    return _distinct(SHORT_ROTATE, rng, SAMPLED_PROMPTS, held_out=False)


def reward_of(given: str, answer: str) -> float:
    """1 if right; else half the share of letters in their right place, 0 for anything that is not letters alone."""
    right = new_task.rotated(given)
    if answer == right:
        return 1.0
    if len(answer) != len(right):
        return 0.0
    return 0.5 * sum(a == b for a, b in zip(answer, right, strict=True)) / len(right)


def _sampled_file(base: Base, encoder: Encoder, data_seed: int) -> list[Sample]:
    from tests.bench.forgetting.sampling import sample_answers

    asked = training_questions(data_seed)
    prompts = [encoder.prompt(new_task.question(given)) for given in asked for _ in range(SAMPLES_PER_PROMPT)]
    generator = torch.Generator().manual_seed(1000 * base.seed + data_seed)
    answers, _ = sample_answers(base.model, prompts, encoder.end_id, generator=generator)
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        group = number // SAMPLES_PER_PROMPT
        row = sample_of(number, prompt, answer, task="sampled")
        rows.append(replace(row, group=group, reward=reward_of(asked[group], encoder.text(answer))))
    return rows


def _wrong_answers(given: str, rng: random.Random) -> dict[str, str]:
    """A wrong arrangement of the letters, in every format."""
    letters = given
    while letters == new_task.rotated(given):
        letters = "".join(rng.sample(given, len(given)))
    return {name: write(letters) for name, write in FORMATS.items()}


def _probed(variant: str) -> list[str]:
    skill = SHORT_ROTATE if variant == "rewards" else ROTATE
    return _distinct(skill, random.Random("new problems"), PROBED_PROMPTS, held_out=True)


def _distinct(skill: Skill, rng: random.Random, count: int, *, held_out: bool) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_input(skill, rng, held_out=held_out)] = None
    return list(found)
