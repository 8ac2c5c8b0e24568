"""The data files: the new task, what must not be forgotten, and the old mixture for replay.

JSONL, one object per line, the same bytes for the same seed. No input of a held-out file occurs in
a training file, nor was any ever trained on by a base model.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modeseek_ray.playground import corpus, new_task
from modeseek_ray.playground.cache import build_lock, data_directory, written_whole
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.mixture import draw_row
from modeseek_ray.playground.skills import LETTERS, SKILLS, Skill, distinct_letters, draw_input

Record = dict[str, Any]

FILES = (
    "new-task.train",
    "new-task.rewarded",
    "new-task.valid",
    "new-task.prompts",
    "new-task.prompts-valid",
    "old-tasks.retention",
    "old-mix.replay",
)
TRAINING_PROMPTS = 1000
VALIDATION_PROMPTS = 100
ONLINE_PROMPTS = 500
ONLINE_LETTERS = 3  # short enough that the base models' guesses are right now and then
RETENTION_ROWS = 40  # of each skill, and of text
REPLAY_ROWS = 2000
TEXT_SHARE = 0.1  # of the replay rows

ROTATE = Skill(new_task.NAME, distinct_letters, new_task.rotated)
SHORT_ROTATE = Skill(
    new_task.NAME, lambda rng: "".join(rng.sample(LETTERS, ONLINE_LETTERS)), new_task.rotated
)


def data_files(home: Path, *, seed: int = 0) -> dict[str, Path]:
    """The files by name, written now if they are not there."""
    directory = data_directory(home, seed=seed)
    with build_lock(directory):
        if not directory.is_dir():
            with written_whole(directory) as partial:
                for name, records in all_records(seed).items():
                    _write(partial / f"{name}.jsonl", records)
    return {name: directory / f"{name}.jsonl" for name in FILES}


def all_records(seed: int) -> dict[str, list[Record]]:
    """The rows of every file. Each file has a generator of its own, so one can grow without moving another."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{name} {seed}")

    train = list(new_task_rows(rng("new-task.train")))
    return {
        "new-task.train": [{k: v for k, v in row.items() if k != "reward"} for row in train],
        "new-task.rewarded": train,
        "new-task.valid": list(validation_rows(rng("new-task.valid"))),
        "new-task.prompts": list(prompt_rows(rng("new-task.prompts"))),
        "new-task.prompts-valid": list(short_validation_rows(rng("new-task.prompts-valid"))),
        "old-tasks.retention": list(retention_rows(rng("old-tasks.retention"))),
        "old-mix.replay": list(replay_rows(rng("old-mix.replay"))),
    }


def new_task_rows(rng: random.Random) -> Iterator[Record]:
    """Every prompt with a right answer in each format, shuffled; `group` names the prompt, `task` the format."""
    rows = []
    for group, given in enumerate(_distinct(ROTATE, rng, TRAINING_PROMPTS, held_out=False)):
        for name, answer in new_task.answers(given).items():
            row = _chat(new_task.question(given), answer, f"rotate/{name}")
            rows.append({**row, "group": group, "reward": new_task.rewards()[name]})
    rng.shuffle(rows)
    for number, row in enumerate(rows):
        yield {"id": f"new-{number:05d}", **row}


def validation_rows(rng: random.Random) -> Iterator[Record]:
    """Held-out prompts with the nearest answer; the other right ones stand under `accept`."""
    for given in _distinct(ROTATE, rng, VALIDATION_PROMPTS, held_out=True):
        first, *others = new_task.answers(given).values()
        yield {**_chat(new_task.question(given), first, new_task.NAME), "accept": others}


def prompt_rows(rng: random.Random) -> Iterator[Record]:
    """Questions alone, for online jobs: the model tries, a grader compares with `reference`."""
    for given in _distinct(SHORT_ROTATE, rng, ONLINE_PROMPTS, held_out=False):
        question = [{"role": "user", "content": new_task.question(given)}]
        yield {"messages": question, "reference": new_task.rotated(given), "task": new_task.NAME}


def short_validation_rows(rng: random.Random) -> Iterator[Record]:
    """Held-out questions of that length; only the plain answer is right."""
    for given in _distinct(SHORT_ROTATE, rng, VALIDATION_PROMPTS, held_out=True):
        yield _chat(new_task.question(given), new_task.rotated(given), new_task.NAME)


def retention_rows(rng: random.Random) -> Iterator[Record]:
    """Held-out rows of every skill and of text, and all facts."""
    for skill in SKILLS:
        for given in _distinct(skill, rng, RETENTION_ROWS, held_out=True):
            yield _chat(skill.question(given), skill.answer(given), skill.name)
    for question, answer in facts():
        yield _chat(question, answer, "facts")
    for document in rng.sample(corpus.held_out_documents(), RETENTION_ROWS):
        yield _text(document)


def replay_rows(rng: random.Random) -> Iterator[Record]:
    """Rows of what the base models were trained on; one in ten is text."""
    training_documents = corpus.training_documents()
    for _ in range(REPLAY_ROWS):
        if rng.random() < TEXT_SHARE:
            yield _text(rng.choice(training_documents))
        else:
            row = draw_row(rng)
            yield _chat(row.question, row.answer, row.task)


def _distinct(skill: Skill, rng: random.Random, count: int, *, held_out: bool) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_input(skill, rng, held_out=held_out)] = None
    return list(found)


def _chat(question: str, answer: str, task: str) -> Record:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "task": task}


def _text(document: str) -> Record:
    """A document cut between two words after its first third, so that no token spans the cut."""
    third = len(document) // 3
    gap = re.compile(r"(?<=\S) (?=\S)").search(document, third)
    cut = gap.start() if gap else third
    return {"prompt": document[:cut], "completion": document[cut:], "task": "text"}


def _write(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
