"""vLLM as one who answers: samples of many requests side by side, text as it is written.

The generator of a training job writes tokens for a trainer; here people read, so vLLM turns tokens
into text and looks for stop texts itself. Loads vLLM in `start` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.generator import GeneratorSpec, Sampling
from modeseek_ray.jobs.engine_wire import EngineSecret, Question, TokenLogprob


@dataclass(frozen=True)
class Piece:
    """What one forward pass added to one sample."""

    name: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None


class Writer(Protocol):
    """Calls come from one thread."""

    def add(self, name: str, question: Question, prompt: int, seed: int) -> None:
        """Begin a sample of the question's prompt number `prompt`."""
        ...

    def step(self) -> list[Piece]:
        """One forward pass. Pieces of what is to be streamed, and samples that are finished."""
        ...

    def abort(self, names: Sequence[str]) -> None: ...


def spec_of(secret: EngineSecret) -> GeneratorSpec:
    """The engine's settings as those of a job's generator; how to sample comes with each question."""
    if secret.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown dtype {secret.dtype!r}")
    return GeneratorSpec(
        model_path=secret.model_path,
        sampling=Sampling(max_tokens=secret.max_length),
        dtype="float32" if secret.dtype == "float32" else "bfloat16",
        max_length=secret.max_length,
        ratios_used=False,
        max_num_seqs=64,
        cpus_per_worker=secret.cpus,
        gpus_per_worker=secret.gpus,
        logprobs_mode="raw_logprobs",
    )


class VllmWriter:
    """A running vLLM."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @classmethod
    def start(cls, secret: EngineSecret) -> VllmWriter:
        """Load the model, first forward pass included. Raises `ConfigError` for what vLLM does not take."""
        from actors.vllm_engine import build

        return cls(build(spec_of(secret)).core)

    def add(self, name: str, question: Question, prompt: int, seed: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if question.stream else RequestOutputKind.FINAL_ONLY
        parameters = SamplingParams(
            temperature=question.temperature,
            top_p=question.top_p,
            presence_penalty=question.presence_penalty,
            frequency_penalty=question.frequency_penalty,
            max_tokens=question.max_tokens[prompt],
            stop=question.stop or None,
            seed=None if question.temperature == 0 else seed,
            logprobs=question.top_logprobs,
            output_kind=kind,
        )
        tokens = {"type": "token", "prompt_token_ids": question.prompts[prompt]}
        self._engine.add_request(name, tokens, parameters)

    def step(self) -> list[Piece]:
        return [_piece(output) for output in self._engine.step()]

    def abort(self, names: Sequence[str]) -> None:
        self._engine.abort_request(list(names))


def _piece(output: Any) -> Piece:
    [written] = output.outputs
    token_ids = list(written.token_ids)
    # A last piece may hold text alone, and then vLLM's "last 0 of the list" are all of them.
    candidates = list(written.logprobs or []) if token_ids else []
    logprobs = [_token_logprob(*pair) for pair in zip(token_ids, candidates, strict=True)]
    return Piece(output.request_id, written.text, token_ids, logprobs, written.finish_reason)


def _token_logprob(token_id: int, candidates: Any) -> TokenLogprob:
    """vLLM gives the drawn token and the likeliest ones, by id; ranks count from 1."""
    drawn = candidates[token_id]
    ranked = sorted(candidates.values(), key=lambda candidate: candidate.rank)
    return TokenLogprob(
        token=drawn.decoded_token or "",
        logprob=float(drawn.logprob),
        top=[(candidate.decoded_token or "", float(candidate.logprob)) for candidate in ranked],
    )
