"""`modeseek ask`: one question to a model of the service, from the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from modeseek_ray.client import Client
from modeseek_ray.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """What was asked, as on the command line."""

    model: str
    prompt: str
    completion: bool
    system: str | None
    n: int
    best_of: int | None
    grader: Path | None
    item: str | None
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int | None

    def options(self) -> dict[str, Any]:
        """The request's fields besides model and question. Raises `ConfigError` for files that do not parse."""
        given = {
            "n": self.n,
            "best_of": self.best_of,
            "grader": None if self.grader is None else _grader(self.grader),
            "item": None if self.item is None else _item(self.item),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": list(self.stop) or None,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}

    def asked(self) -> str | list[dict[str, str]]:
        """A text, or messages."""
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        if self.completion:
            return prompt
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]


def _model(client: Client, name: str) -> str:
    """A model by its own name, or by the job that made it. Raises `ConfigError` while there is none."""
    if not name.startswith("ftjob-"):
        return name
    job = client.job(name)
    if model := job.get("fine_tuned_model"):
        return str(model)
    raise ConfigError(
        f"{name} has no model: it is {job['status']}.",
        param="MODEL",
        mend="Wait until it has succeeded, or ask a checkpoint; `modeseek show JOB` names them.",
    )


def ask(url: str, api_key: str | None, question: Question, *, as_json: bool) -> None:
    """Print the answers, each with its reward where there is a grader."""
    asked, options = question.asked(), question.options()
    waiting = Console(stderr=True)
    with Client(url, api_key) as client, waiting.status(f"{question.model} is asked …"):
        answer = client.ask(_model(client, question.model), asked, **options)
    if as_json:
        print(json.dumps(answer, ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False)
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        if question.grader is not None:
            reward = choice["reward"]
            console.print(f"reward {reward:g}" if reward is not None else choice["reward_error"], style="dim")
        console.print(text, markup=False)
    if answer.get("rewards"):
        rewards = [reward for group in answer["rewards"] for reward in group if reward is not None]
        mean = sum(rewards) / len(rewards)
        console.print(f"{len(rewards)} answers graded, mean reward {mean:.3g}", style="dim")


def _grader(path: Path) -> Any:
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the grader cannot be read: {error}.", param="--grader", mend="Mend the file."
        ) from None
    # A job's file has it under `grader`; both are understood.
    return section["grader"] if isinstance(section, dict) and set(section) == {"grader"} else section


def _item(text: str) -> Any:
    try:
        item = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"it is not JSON: {error}.", param="--item", mend="Quote it for the shell."
        ) from None
    if not isinstance(item, dict):
        raise ConfigError("it is no JSON object.", param="--item", mend='Give {"reference": …}.')
    return item
