"""An inference engine's real process around a writer that needs no model: `python -m … SECRET`.

Every sample is one letter that its seed decides, again and again: letter number k of the alphabet with
log-probability -k / 10 a token. So what is best, and what was mixed up, can be told from the text.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.answer_server import AnswerServer
from actors.answer_writer import Piece
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.engine_wire import EngineSecret, Question, TokenLogprob

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class _Sample:
    question: Question
    prompt: int
    letter: int
    written: int = 0


class LetterWriter:
    """One token a sample and step; a step takes a hundredth of a second."""

    def __init__(self) -> None:
        self.samples: dict[str, _Sample] = {}

    def add(self, name: str, question: Question, prompt: int, seed: int) -> None:
        self.samples[name] = _Sample(question, prompt, seed % len(LETTERS))

    def step(self) -> list[Piece]:
        time.sleep(0.01)
        pieces = []
        for name, sample in list(self.samples.items()):
            sample.written += 1
            ended = sample.written == sample.question.max_tokens[sample.prompt]
            if ended:
                del self.samples[name]
            if ended or sample.question.stream:
                count = 1 if sample.question.stream else sample.written
                letter = LETTERS[sample.letter]
                logprob = TokenLogprob(token=letter, logprob=-sample.letter / 10, top=[(letter, -0.5)])
                reason = "length" if ended else None
                pieces.append(Piece(name, letter * count, [sample.letter] * count, [logprob] * count, reason))
        return pieces

    def abort(self, names: Sequence[str]) -> None:
        for name in names:
            self.samples.pop(name, None)


def start(secret: EngineSecret) -> LetterWriter:
    if "unloadable" in secret.model_path:
        raise ConfigError("vLLM does not take this model.", param="model", mend="Choose another.")
    return LetterWriter()


async def main(path: Path) -> None:
    server = AnswerServer(EngineSecret.model_validate_json(path.read_text()), start, heartbeat_s=0.1)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.end, "ended from outside")
    await server.run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
