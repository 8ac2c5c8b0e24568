"""Requests in, answers out: one thread steps the writer as long as there is something to write.

A question's samples are written side by side with those of all others. Who stops listening is not
written for any more. After an exception inside the writer nothing is known of its state: every open
question gets the error, `broken` is set, and the process is to end.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

from actors.answer_writer import Piece, Writer
from modeseek_ray.errors import WorkerError
from modeseek_ray.jobs.engine_wire import MAX_SAMPLES, Part, Question

log = logging.getLogger(__name__)

_Answers = asyncio.Queue[Part | WorkerError]


class AnswerLoop:
    """Build it in an event loop, `close` it when done."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[tuple[int, Question, _Answers] | list[str] | None] = (
            queue.SimpleQueue()
        )
        self._open: dict[str, tuple[int, _Answers]] = {}  # by sample name; the thread's own
        self.broken = asyncio.Event()
        self.num_waiting = 0  # samples asked for and not finished
        self.num_tokens = 0
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    async def answer(self, question: Question) -> AsyncIterator[Part]:
        """Parts of the samples in the order in which they are written. Raises `WorkerError`.

        Leaving the iteration early (`aclose`) aborts what is not written yet.
        """
        total = len(question.seeds)
        if self.num_waiting and self.num_waiting + total > 2 * MAX_SAMPLES:
            raise WorkerError(
                f"{self.num_waiting} answers wait for this model already.",
                mend="Try again later, or ask for fewer samples.",
                code="engine_full",
            )
        number = next(self._numbers)
        answers: _Answers = asyncio.Queue()
        left = {f"{number}.{sample}": sample for sample in range(total)}
        self.num_waiting += total
        try:
            self._inbox.put((number, question, answers))
            while left:
                part = await answers.get()
                if isinstance(part, WorkerError):
                    raise part
                self.num_tokens += len(part.token_ids)
                if part.finish_reason is not None:
                    del left[f"{number}.{part.sample}"]
                    self.num_waiting -= 1
                yield part
        finally:
            if left:
                self.num_waiting -= len(left)
                self._inbox.put(list(left))

    async def close(self) -> None:
        """End the thread after its present step; open questions are not answered."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 30)

    def _run(self) -> None:
        try:
            while self._take_in():
                for piece in self._writer.step():
                    self._hand_out(piece)
        except Exception as error:
            log.critical("the engine broke", exc_info=error)
            broken = WorkerError(
                f"the inference engine broke: {error!r}.", mend="Ask again: another one is started."
            )
            for _, answers in self._open.values():
                self._tell(answers, broken)
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.broken.set)

    def _take_in(self) -> bool:
        """Take what is asked; wait only if there is nothing to write. False = close."""
        while True:
            try:
                message = self._inbox.get(block=not self._open)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, list):
                names = [name for name in message if self._open.pop(name, None) is not None]
                if names:
                    self._writer.abort(names)
            else:
                self._begin(*message)

    def _begin(self, number: int, question: Question, answers: _Answers) -> None:
        per_prompt = question.samples_per_prompt
        for sample, seed in enumerate(question.seeds):
            name = f"{number}.{sample}"
            self._open[name] = (sample, answers)
            self._writer.add(name, question, sample // per_prompt, seed)

    def _hand_out(self, piece: Piece) -> None:
        if piece.name not in self._open:
            return  # aborted meanwhile
        sample, answers = self._open[piece.name]
        if piece.finish_reason is not None:
            del self._open[piece.name]
        self._tell(
            answers,
            Part(
                sample=sample,
                text=piece.text,
                token_ids=piece.token_ids,
                logprobs=piece.logprobs,
                finish_reason=piece.finish_reason,
            ),
        )

    def _tell(self, answers: _Answers, what: Part | WorkerError) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(answers.put_nowait, what)
