"""From a request to answers: tokens, an engine, grades, the best of N. What both routes share.

P  prompts      N  answers written for each      n  answers returned of each
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError, ModelError
from modeseek_ray.jobs.engine_keeper import job_of_checkpoint
from modeseek_ray.jobs.engine_wire import Part, Question, TokenLogprob
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.rewards import GradeItem, build_grader, check_grader, read_endpoints
from modeseek_ray.service import engine_calls
from modeseek_ray.service.completion_wire import AskRequest, ChatRequest, CompletionRequest, Usage
from modeseek_ray.service.context import Caller, Service
from modeseek_ray.service.errors import RequestError
from modeseek_ray.service.graders import for_one


@dataclass
class Sample:
    """One answer as it grows, and how good it is."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    reward: float | None = None
    reward_error: str | None = None

    @property
    def mean_logprob(self) -> float:
        """Nats per token; an answer of no token ranks last."""
        if not self.logprobs:
            return -float("inf")
        return sum(entry.logprob for entry in self.logprobs) / len(self.logprobs)

    def add(self, part: Part) -> None:
        self.text += part.text
        self.token_ids += part.token_ids
        self.logprobs += part.logprobs
        self.finish_reason = part.finish_reason


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: checked, tokenised, its model found."""

    request: AskRequest
    path: Path
    question: Question

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.question.prompts))

    def usage(self, completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
        )


@dataclass(frozen=True)
class Answered:
    """[P][n] answers, the best first, and the rewards of all that were written, [P][N]."""

    chosen: list[list[Sample]]
    rewards: list[list[float | None]] | None
    usage: Usage


async def prepare(service: Service, caller: Caller, request: AskRequest) -> Asked:
    """Everything that can be refused is refused here, before an engine is started."""
    if request.grader is not None:
        check_grader(request.grader, fields=request.item.keys())
        _build(service, request)  # a judge the operator does not allow, a classifier nobody has loaded
    return await run_in_threadpool(_prepare, service, caller, request)


def _prepare(service: Service, caller: Caller, request: AskRequest) -> Asked:
    path, files = _find(service, caller, request.model)
    info = ModelInfo.read(files)
    prompts = _tokenise(request, files, info)
    limit = min(info.max_length, _max_length(service))
    best_of = request.best_of or request.n
    question = Question(
        prompts=prompts,
        seeds=_seeds(request.seed, len(prompts) * best_of),
        max_tokens=[_room(request, len(prompt), limit) for prompt in prompts],
        temperature=request.temperature,
        top_p=request.top_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        stop=request.stop,
        top_logprobs=_top_logprobs(request),
        stream=request.stream,
    )
    return Asked(request, path, question)


def _find(service: Service, caller: Caller, name: str) -> tuple[Path, Path]:
    """The directory to answer from, and the one with the tokenizer: a checkpoint has its job's model's."""
    try:
        path = service.resolve_model(name, caller.tenant_id).resolve()
    except ModelError as error:
        if error.code == "checkpoint_not_exported":
            found = service.store.models.checkpoint_path(name, caller.tenant_id)
            job = None if found is None else job_of_checkpoint(service.home, found.resolve())
            if found is not None and job is not None:
                return found.resolve(), job.model_path
        if error.code == "model_not_found":
            error.http_status = 404
        raise
    return path, path


async def answer(service: Service, asked: Asked) -> Answered:
    """All answers, graded or ranked where that was asked for."""
    samples = [Sample() for _ in asked.question.seeds]
    async for part in engine_calls.ask(service, asked.request.model, asked.path, asked.question):
        samples[part.sample].add(part)
    request = asked.request
    if request.grader is not None:
        await _grade(service, request, samples)
    per_prompt = asked.question.samples_per_prompt
    groups = [samples[i : i + per_prompt] for i in range(0, len(samples), per_prompt)]
    usage = asked.usage(sum(len(sample.token_ids) for sample in samples))
    service.metrics.observe_answers(len(samples), usage.prompt_tokens, usage.completion_tokens)
    rewards = [[sample.reward for sample in group] for group in groups] if request.grader else None
    return Answered([_best(request, group) for group in groups], rewards, usage)


async def stream(service: Service, asked: Asked) -> AsyncIterator[Part]:
    """Parts as they are written. Counted when all are there."""
    written = 0
    async for part in engine_calls.ask(service, asked.request.model, asked.path, asked.question):
        written += len(part.token_ids)
        yield part
    service.metrics.observe_answers(len(asked.question.seeds), asked.prompt_tokens, written)


def _best(request: AskRequest, group: list[Sample]) -> list[Sample]:
    """The n best, the best first; in the order of writing where nothing says which is better."""
    if request.grader is not None:
        # Of equal rewards the one that was written first: sorting is stable.
        group = sorted(group, key=lambda s: -float("inf") if s.reward is None else s.reward, reverse=True)
    elif len(group) > request.n:
        group = sorted(group, key=lambda sample: sample.mean_logprob, reverse=True)
    return group[: request.n]


async def _grade(service: Service, request: AskRequest, samples: Sequence[Sample]) -> None:
    grader = _build(service, request)
    try:
        items = [GradeItem(sample.text, request.item, len(sample.token_ids)) for sample in samples]
        grades = await grader.grade(items)
    finally:
        await grader.close()
    for sample, grade in zip(samples, grades, strict=True):
        sample.reward, sample.reward_error = grade.reward, grade.error
    if all(grade.reward is None for grade in grades):
        raise RequestError(
            f"none of the {len(grades)} answers could be graded: {grades[0].error}.",
            param="grader",
            mend="Try the grader on one answer: POST /v1/fine_tuning/alpha/graders/run.",
            code="grader_failing",
        )


def _build(service: Service, request: AskRequest) -> Any:
    endpoints = [for_one(endpoint) for endpoint in read_endpoints(service.home.endpoints)]
    return build_grader(request.grader, endpoints=endpoints)


def _tokenise(request: AskRequest, path: Path, info: ModelInfo) -> list[list[int]]:
    tokenizer = _tokenizer(path, (path / "tokenizer.json").stat().st_mtime_ns)
    if isinstance(request, ChatRequest):
        messages = [message.for_template() for message in request.messages]
        try:
            return [tokenizer.encode_prompt(messages).tolist()]
        except DataError as error:
            error.param = "messages"
            raise
    assert isinstance(request, CompletionRequest)
    prompts = []
    for prompt in request.prompt:
        tokens = tokenizer.encode_prompt(prompt).tolist() if isinstance(prompt, str) else prompt
        if not tokens:
            raise RequestError(
                "the prompt has no token.", param="prompt", mend="Give the model something to continue."
            )
        if max(tokens) >= info.vocab_size:
            raise RequestError(
                f"token {max(tokens)} is none of the model's {info.vocab_size}.",
                param="prompt",
                mend="Use the model's own tokenizer.",
                code="unknown_token",
            )
        prompts.append(tokens)
    return prompts


@lru_cache(maxsize=8)
def _tokenizer(path: Path, _changed_ns: int) -> ChatTokenizer:
    return ChatTokenizer(path)


def _max_length(service: Service) -> int:
    keeper = None if service.reconciler is None else service.reconciler.engines
    return 2**31 if keeper is None else keeper.settings.max_length


def _room(request: AskRequest, num_prompt: int, limit: int) -> int:
    """Tokens an answer may have. Raises `RequestError` where prompt and answer do not fit the model."""
    wanted = request.max_tokens if isinstance(request, CompletionRequest) else None
    if isinstance(request, ChatRequest):
        wanted = request.max_tokens or request.max_completion_tokens
    room = limit - num_prompt
    if room < (wanted or 1):
        answer = "and the answer" if wanted is None else f"and {wanted} of the answer"
        raise RequestError(
            f"the prompt has {num_prompt} tokens, {answer} has to fit in as well; the limit is {limit}.",
            param="prompt" if isinstance(request, CompletionRequest) else "messages",
            mend="Shorten it, or lower max_tokens.",
            code="context_length_exceeded",
        )
    return wanted or room


def _top_logprobs(request: AskRequest) -> int:
    if isinstance(request, ChatRequest):
        return request.top_logprobs
    assert isinstance(request, CompletionRequest)
    return request.logprobs or 0


def _seeds(seed: int | None, count: int) -> list[int]:
    """One for each answer, 63 bits; those of a request with a seed depend on nothing else."""
    if seed is None:
        return [secrets.randbits(63) for _ in range(count)]
    digests = (hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest() for i in range(count))
    return [int.from_bytes(digest, "big") >> 1 for digest in digests]
