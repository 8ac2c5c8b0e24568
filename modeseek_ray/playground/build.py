"""Make a playground model, or return the one that is already there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modeseek_ray.errors import ModelError
from modeseek_ray.playground.cache import build_lock, model_directory, written_whole
from modeseek_ray.playground.recipe import HELD_OUT_ACCURACY, VOCABULARY_SIZE, Recipe, recipe_of


def build(
    name: str, home: Path, *, seed: int = 0, progress: bool = True, recipe: Recipe | None = None
) -> Path:
    """The directory of the model `name`, trained now if it is not there: an ordinary Hugging Face model.

    `playground.json` in it says what was measured. Two processes never build the same model at
    once: the second waits and finds it done. Raises `ModelError` if a skill's held-out accuracy is
    below .9; nothing is kept then.
    """
    recipe = recipe or recipe_of(name)
    directory = model_directory(name, home, seed=seed, recipe=recipe)
    with build_lock(directory):
        if not directory.is_dir():
            with written_whole(directory) as partial:
                _train_and_save(recipe, partial, seed=seed, progress=progress)
    return directory


def refuse_weak(accuracy: dict[str, float], name: str) -> None:
    """Raises `ModelError` naming every skill below the gate, with its accuracy."""
    weak = {task: value for task, value in accuracy.items() if value < HELD_OUT_ACCURACY}
    if weak:
        listed = ", ".join(f"{task} {value:.3f}" for task, value in weak.items())
        raise ModelError(
            f"playground/{name} did not learn: {listed} (at least {HELD_OUT_ACCURACY} is asked of each).",
            mend="Train it for more steps (`steps` in modeseek_ray/playground/recipe.py) or try another seed.",
            code="playground_too_weak",
        )


def _train_and_save(recipe: Recipe, directory: Path, *, seed: int, progress: bool) -> None:
    # Threads that spin while they wait cost a busy machine several times the work itself. Read when
    # torch is loaded, which is why torch is first imported below.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from modeseek_ray.playground import corpus
    from modeseek_ray.playground.facts import facts
    from modeseek_ray.playground.model import new_model
    from modeseek_ray.playground.pretrain import held_out_accuracy, held_out_text_nll, pretrain
    from modeseek_ray.playground.skills import SKILLS
    from modeseek_ray.playground.tokenizer import train_tokenizer

    started, cpu_started = time.monotonic(), time.process_time()
    questions = [question for question, _ in facts()] + [skill.name for skill in SKILLS]
    texts = list(corpus.training_documents()) + questions * 300
    tokenizer = train_tokenizer(texts, VOCABULARY_SIZE)
    model = new_model(recipe, tokenizer, seed=seed)
    with _bar(f"playground/{recipe.name}", recipe.steps, progress) as on_step:
        pretrain(model, tokenizer, recipe, seed=seed, on_step=on_step)
    accuracy = held_out_accuracy(model, tokenizer)
    refuse_weak(accuracy, recipe.name)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    measured: dict[str, Any] = {
        "name": recipe.name,
        "seed": seed,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "held_out_accuracy": accuracy,
        "held_out_text_nll": held_out_text_nll(model, tokenizer),
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(time.process_time() - cpu_started, 1),
        "recipe": asdict(recipe),
    }
    (directory / "playground.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _bar(title: str, steps: int, shown: bool) -> Iterator[Callable[[int, float, float], None]]:
    """A bar with losses and time left, on stderr; ten lines instead where that is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers {task.fields[answers]:.3f} text {task.fields[text]:.3f} nats"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=steps, answers=float("nan"), text=float("nan"))
        started = time.monotonic()

        def on_step(step: int, answer_loss: float, text_loss: float) -> None:
            done = step + 1
            bar.update(task, advance=1, answers=answer_loss, text=text_loss)
            if shown and not console.is_terminal and done % max(1, steps // 10) == 0:
                left_s = (time.monotonic() - started) / done * (steps - done)
                losses = f"answers {answer_loss:.3f} text {text_loss:.3f} nats"
                print(f"{title} {done}/{steps} {losses} ETA {left_s:.0f} s", file=sys.stderr, flush=True)

        yield on_step
