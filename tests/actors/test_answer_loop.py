"""Many questions side by side in one writer: nothing mixed up, nothing written for who has gone, one end for all."""

from __future__ import annotations

import asyncio

import pytest

from actors.answer_loop import AnswerLoop
from actors.answer_writer import Piece
from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.engine_wire import MAX_SAMPLES, Question
from tests.modeseek_ray.service.fake_engine import LETTERS, LetterWriter


def question(*seeds: int, tokens: int = 5, stream: bool = False) -> Question:
    return Question(prompts=[[1, 2]], seeds=list(seeds), max_tokens=[tokens], stream=stream)


async def texts(loop: AnswerLoop, asked: Question) -> list[str]:
    found = [""] * len(asked.seeds)
    async for part in loop.answer(asked):
        found[part.sample] += part.text
    return found


async def test_questions_that_overlap_get_their_own_answers() -> None:
    loop = AnswerLoop(LetterWriter())
    asked = [question(n, n + 1, tokens=1 + n % 4, stream=n % 2 == 0) for n in range(20)]
    answers = await asyncio.gather(*(texts(loop, one) for one in asked))
    for n, answer in enumerate(answers):
        assert answer == [LETTERS[n] * (1 + n % 4), LETTERS[n + 1] * (1 + n % 4)]
    assert loop.num_waiting == 0 and loop.num_tokens == sum(2 * (1 + n % 4) for n in range(20))
    await loop.close()


async def test_who_leaves_is_not_written_for() -> None:
    writer = LetterWriter()
    loop = AnswerLoop(writer)
    parts = loop.answer(question(1, 2, tokens=10_000, stream=True))
    await anext(parts)
    await parts.aclose()  # type: ignore[attr-defined]
    assert await texts(loop, question(3)) == ["d" * 5]  # and by then the writer has heard of it
    assert writer.samples == {} and loop.num_waiting == 0
    await loop.close()


async def test_a_writer_that_breaks_ends_every_question() -> None:
    class Breaking(LetterWriter):
        def step(self) -> list[Piece]:
            if len(self.samples) == 3:
                raise RuntimeError("out of memory")
            return []

    loop = AnswerLoop(Breaking())
    asked = [asyncio.create_task(texts(loop, question(1))), asyncio.create_task(texts(loop, question(2, 3)))]
    for task in asked:
        with pytest.raises(WorkerError, match="out of memory"):
            await task
    await asyncio.wait_for(loop.broken.wait(), 60)


async def test_there_is_an_end_to_how_many_may_wait() -> None:
    loop = AnswerLoop(LetterWriter())
    held = [loop.answer(question(*range(MAX_SAMPLES), tokens=10_000, stream=True)) for _ in range(2)]
    for parts in held:
        await anext(parts)
    with pytest.raises(WorkerError) as refused:
        await texts(loop, question(1))
    assert refused.value.code == "engine_full"
    for parts in held:
        await parts.aclose()  # type: ignore[attr-defined]
    assert await texts(loop, question(1)) == ["b" * 5]
    await loop.close()
