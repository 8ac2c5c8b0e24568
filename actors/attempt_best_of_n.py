"""One attempt at a best-of-N job: write N answers to each question, grade them, keep the best.

No training, unless `then` asks for it: the same attempt goes on as a weighted job whose training
file are the candidates, with their rewards and the log-probabilities they were drawn with.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.answers import Answerer
from actors.attempt import Attempt
from actors.attempt_online import generator_spec
from actors.attempt_spec import AttemptResult
from actors.driver import DriverState, Outcome
from actors.grading import Grading
from actors.rollouts import Rollout, RolloutStore, by_prompt
from modeseek_ray.config import BestOfNMethod, parse_config
from modeseek_ray.data.prompts import load_prompts
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.types import Prompt


class BestOfNAttempt(Attempt):
    """Runs an `AttemptSpec` whose method is `best_of_n`."""

    async def _run(self) -> AttemptResult:
        method = self._method
        tokenizer = ChatTokenizer(self._spec.model_path)
        room = self._max_length - method.rollout.max_tokens
        prompts = load_prompts(self._spec.files["training_file"], tokenizer, max_tokens=room)
        size = method.rollout.prompts_per_round
        rounds = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        store = RolloutStore(self._spec.directory / "rollouts")
        self._record("running", total_steps=len(rounds))
        wanted = await self._write(rounds, store, tokenizer)
        if wanted != "run":
            return self._stopped(Outcome(wanted, DriverState(), {}))  # type: ignore[arg-type]
        results = self._spec.directory / "results"
        rollouts = [r for number in range(len(rounds)) for r in store.read(number, prompts) or ()]
        files = [
            write_choices(results / "best_of_n.jsonl", rollouts),
            store.gathered(results / "rollouts.parquet", len(rounds)),
        ]
        if method.then is not None:
            return await self._train(files)
        self._record("succeeded", finished_at=time.time())
        return AttemptResult(Outcome("run", DriverState(step=len(rounds)), {}), result_files=files)

    @property
    def _method(self) -> BestOfNMethod:
        method = self._config.best_of_n
        if method is None:
            raise TypeError(f"{self._config.method.type} is not a best-of-N job")
        return method

    async def _write(
        self, rounds: Sequence[Sequence[Prompt]], store: RolloutStore, tokenizer: ChatTokenizer
    ) -> str:
        """Answer what an earlier attempt has not. Returns what the user wants after the last round."""
        missing = [n for n, prompts in enumerate(rounds) if store.read(n, prompts) is None]
        if not missing:
            return "run"
        resources, method = self._config.resources, self._method
        spec = generator_spec(self._config, str(self._spec.model_path), self._max_length)
        grading = Grading.of(self._config, self._spec.endpoints, self._spec.judges)
        await self._placement.reserve(
            trainers=0, generators=resources.generators, generator=spec, classifiers=grading.seats()
        )
        generator = await self._placement.generators(spec, resources.generators)
        grader = await grading.start(self._placement)
        answerer = Answerer(generator, grader, tokenizer, max_failed_share=method.rollout.max_failed_share)
        try:
            await self._journal.section("setup", deadline_s=1800)
            await self._journal.message("Generators are ready.", **await generator.setup())
            for number in missing:
                wanted = await self._journal.desired()
                if wanted != "run":
                    return wanted
                await self._journal.section("rollout", deadline_s=3600)
                rollouts, seconds = await answerer.answer(rounds[number], number)
                store.write(number, rollouts)
                await self._tell(number, len(rounds), rollouts, seconds)
            return "run"
        finally:
            await grader.close()
            await generator.close()
            await self._placement.close()

    async def _tell(
        self, number: int, rounds: int, rollouts: Sequence[Rollout], seconds: dict[str, float]
    ) -> None:
        best = [max(rewards) for group in by_prompt(rollouts) if (rewards := _rewards(group))]
        every = _rewards(rollouts)
        means = [sum(values) / max(len(values), 1) for values in (every, best)]
        await self._journal.message(
            f"Round {number + 1}/{rounds}: mean reward {means[0]:.3f}, of the best {means[1]:.3f}.",
            mean_reward=means[0],
            best_reward=means[1],
            seconds=seconds,
        )

    async def _train(self, files: list[Path]) -> AttemptResult:
        """Go on as a weighted job on all candidates."""
        config = self._config.model_dump(mode="json", exclude_unset=True)
        config["method"] = {"type": "weighted", "weighted": config["method"]["best_of_n"]["then"]}
        paths = {**self._spec.files, "training_file": files[1]}
        spec = replace(self._spec, config=parse_config(config), files=paths)
        result = await Attempt(spec, self._placement, self._journal)._run()
        return replace(result, result_files=[*result.result_files, *files])


def write_choices(path: Path, rollouts: Sequence[Rollout]) -> Path:
    """One line per question: the best answer, and every candidate with its reward.

    Of equal rewards the first written wins. A question none of whose answers could be graded has
    `best: null`.
    """
    lines = []
    for group in by_prompt(rollouts):
        graded = [r for r in group if r.grade.reward is not None]
        best = max(graded, key=lambda r: r.grade.reward or 0.0, default=None)
        row: dict[str, Any] = {
            "line": group[0].prompt.ordinal + 1,
            "id": group[0].prompt.reference.get("id"),
            "best": None if best is None else best.text,
            "reward": None if best is None else best.grade.reward,
            "choice": None if best is None else best.sample,
            "candidates": [
                {
                    "text": r.text,
                    "reward": r.grade.reward,
                    "error": r.grade.error,
                    "tokens": r.completion.num_tokens,
                }
                for r in group
            ],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _rewards(rollouts: Sequence[Rollout]) -> list[float]:
    return [r.grade.reward for r in rollouts if r.grade.reward is not None]
