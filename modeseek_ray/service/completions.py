"""`POST /v1/completions` and `POST /v1/chat/completions`: ask a model that is here. OpenAI's routes.

The model's engine is started by the first question and ends when nobody asks any more.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.engine_wire import Part, TokenLogprob
from modeseek_ray.jobs.records import new_id
from modeseek_ray.service import asking
from modeseek_ray.service.asking import Asked, Sample
from modeseek_ray.service.body import read_json
from modeseek_ray.service.completion_wire import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    TopLogprob,
    parse_request,
)
from modeseek_ray.service.context import CallerDep, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, error_response
from modeseek_ray.strict import Strict

router = APIRouter(prefix="/v1", tags=["answers"], responses=ERROR_RESPONSES)


def _docs(model: type[Strict]) -> dict[str, Any]:
    """The body is read strictly by hand; this is what `/docs` shows of it."""
    stream = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}, "responses": {"200": stream}}


@router.post("/completions", response_model=Completion, openapi_extra=_docs(CompletionRequest))
async def create_completion(
    request: Request, service: ServiceDep, caller: CallerDep
) -> Completion | StreamingResponse:
    """Continue a text, or several. With `stream` as server-sent events."""
    body = parse_request(CompletionRequest, await read_json(request, service.settings.max_body_bytes))
    asked = await asking.prepare(service, caller, body)
    head = {"id": new_id("cmpl"), "created": int(service.store.database.clock()), "model": body.model}
    with_logprobs = body.logprobs is not None
    if body.stream:
        offsets = [0] * len(asked.question.seeds)

        def chunk(part: Part) -> dict[str, Any]:
            logprobs = _completion_logprobs(part.logprobs, body.logprobs or 0, offsets[part.sample])
            offsets[part.sample] += len(part.text)
            choice = CompletionChoice(
                index=part.sample,
                text=part.text,
                finish_reason=part.finish_reason,
                logprobs=logprobs if with_logprobs else None,
            )
            return choice.model_dump(exclude={"reward", "reward_error"})

        return await _streamed(service, asked, {**head, "object": "text_completion"}, chunk, [])
    answered = await asking.answer(service, asked)
    choices = [
        CompletionChoice(
            index=index,
            text=sample.text,
            finish_reason=sample.finish_reason,
            logprobs=_completion_logprobs(sample.logprobs, body.logprobs or 0) if with_logprobs else None,
            reward=sample.reward,
            reward_error=sample.reward_error,
        )
        for index, sample in enumerate(sample for group in answered.chosen for sample in group)
    ]
    return Completion(**head, choices=choices, usage=answered.usage, rewards=answered.rewards)


@router.post("/chat/completions", response_model=ChatCompletion, openapi_extra=_docs(ChatRequest))
async def create_chat_completion(
    request: Request, service: ServiceDep, caller: CallerDep
) -> ChatCompletion | StreamingResponse:
    """The assistant's next message. With `stream` as server-sent events."""
    body = parse_request(ChatRequest, await read_json(request, service.settings.max_body_bytes))
    asked = await asking.prepare(service, caller, body)
    head = {"id": new_id("chatcmpl"), "created": int(service.store.database.clock()), "model": body.model}

    def logprobs_of(entries: list[TokenLogprob]) -> ChatLogprobs | None:
        return _chat_logprobs(entries, body.top_logprobs) if body.logprobs else None

    if body.stream:

        def delta(sample: int, said: dict[str, Any], part: Part | None = None) -> dict[str, Any]:
            logprobs = None if part is None else logprobs_of(part.logprobs)
            return {
                "index": sample,
                "delta": said,
                "finish_reason": None if part is None else part.finish_reason,
                "logprobs": None if logprobs is None else logprobs.model_dump(),
            }

        first = [
            delta(i, {"role": "assistant", "content": "", "refusal": None})
            for i in range(len(asked.question.seeds))
        ]
        return await _streamed(
            service,
            asked,
            {**head, "object": "chat.completion.chunk"},
            lambda part: delta(part.sample, {"content": part.text} if part.text else {}, part),
            first,
        )
    answered = await asking.answer(service, asked)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=sample.text),
            finish_reason=sample.finish_reason,
            logprobs=logprobs_of(sample.logprobs),
            reward=sample.reward,
            reward_error=sample.reward_error,
        )
        for index, sample in enumerate(_only(answered.chosen))
    ]
    return ChatCompletion(**head, choices=choices, usage=answered.usage, rewards=answered.rewards)


def _only(chosen: list[list[Sample]]) -> list[Sample]:
    [group] = chosen
    return group


async def _streamed(
    service: ServiceDep,
    asked: Asked,
    head: dict[str, Any],
    chunk: Callable[[Part], dict[str, Any]],
    first: list[dict[str, Any]],
) -> StreamingResponse:
    """One event a part, then the usage if it is wanted, then `[DONE]`. The engine is waited for first.

    So a model that cannot be asked now is an ordinary error with its status, not a broken stream.
    """
    parts = asking.stream(service, asked)
    beginning = await anext(parts)
    options = asked.request.stream_options
    with_usage = options is not None and options.include_usage

    async def events() -> AsyncIterator[bytes]:
        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            usage = {"usage": None} if with_usage else {}
            return format_sse_event(data_str=json.dumps({**head, "choices": choices, **usage, **more}))

        written = 0
        try:
            for choice in first:
                yield event([choice])
            written += len(beginning.token_ids)
            yield event([chunk(beginning)])
            async for part in parts:
                written += len(part.token_ids)
                yield event([chunk(part)])
            if with_usage:
                yield event([], usage=asked.usage(written).model_dump())
            yield format_sse_event(data_str="[DONE]")
        except ModeseekError as error:  # too late for a status
            yield format_sse_event(data_str=bytes(error_response(error).body).decode())
        finally:
            await parts.aclose()  # type: ignore[attr-defined]

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _completion_logprobs(entries: list[TokenLogprob], num_top: int, offset: int = 0) -> CompletionLogprobs:
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return CompletionLogprobs(
        tokens=[entry.token for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[dict(entry.top[:num_top]) for entry in entries],
        text_offset=offsets,
    )


def _chat_logprobs(entries: list[TokenLogprob], num_top: int) -> ChatLogprobs:
    def top(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **top(entry.token, entry.logprob),
                top_logprobs=[TopLogprob(**top(*likely)) for likely in entry.top[:num_top]],
            )
            for entry in entries
        ]
    )
