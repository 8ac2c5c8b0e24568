"""What service and inference engine say to each other: a question in tokens, answers as lines of JSON.

One `POST /answer` carries all samples of a request. The engine's answer is a stream of lines, each a
`Part` of one sample, or `{"error": {…}}` as the last one.

    P  prompts      N  samples of a prompt; sample number = prompt * N + which of its N
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modeseek_ray.strict import Strict

MAX_SAMPLES = 1024  # of one request
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Question(Strict):
    """Prompts in tokens, how often each is to be answered, and how."""

    prompts: list[list[int]] = Field(min_length=1, max_length=MAX_SAMPLES)  # [P]
    seeds: list[Seed] = Field(min_length=1, max_length=MAX_SAMPLES)  # [P * N]
    max_tokens: list[int] = Field(min_length=1, max_length=MAX_SAMPLES)  # [P], of an answer
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = Field(default_factory=list)
    top_logprobs: int = Field(0, ge=0, le=20)  # beside that of the token itself
    stream: bool = False  # parts as they are written, rather than each sample whole

    @property
    def samples_per_prompt(self) -> int:
        return len(self.seeds) // len(self.prompts)


class TokenLogprob(Strict):
    """A token as text, and its log-probability at temperature one, nats."""

    token: str
    logprob: float
    top: list[tuple[str, float]] = Field(default_factory=list)


class Part(Strict):
    """What came next of one sample; the last of a sample has a `finish_reason`."""

    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None  # stop or length


class EngineSecret(Strict):
    """What an engine is told when it starts, in a file that only its owner can read."""

    engine: str
    token: str
    url: str  # of the service
    model_path: str  # where a checkpoint is to be written out first, if there is one
    checkpoint: str | None = None
    job: str | None = None  # the `JobSpec` of the job that wrote the checkpoint
    dtype: str  # float32 or bfloat16
    max_length: int  # prompt and answer together, tokens
    idle_s: float
    lease_s: float
    cpus: float
    gpus: float
    ports: tuple[int, int] = (0, 0)  # first and last it may listen on; 0 = any
