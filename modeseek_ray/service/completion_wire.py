"""`/v1/completions` and `/v1/chat/completions` on the wire: OpenAI's requests, strict, and their answers.

Ours beside OpenAI's: `grader` and `item` (and `best_of` in chats) in requests, `reward` in choices and
`rewards` in answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, JsonValue, PlainValidator, ValidationError, WithJsonSchema

from modeseek_ray.config import config_error
from modeseek_ray.jobs.engine_wire import MAX_SAMPLES
from modeseek_ray.rewards import GraderSection
from modeseek_ray.service.errors import RequestError
from modeseek_ray.strict import Strict

MAX_N = 128
MAX_TOKEN_ID = 2**31 - 1
_MAX_STOP = 16

# OpenAI's fields that are not supported here -> values that ask for nothing.
_NOT_FOR_COMPLETIONS: dict[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",), "logit_bias": ({},)}
_NOT_FOR_CHATS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def _prompts(given: Any) -> list[str | list[int]]:
    """A text, tokens, or a list of either."""
    many = given if isinstance(given, list) and not _are_tokens(given) else [given]
    if not 0 < len(many) <= MAX_SAMPLES:
        raise ValueError(f"give between 1 and {MAX_SAMPLES} prompts")
    for prompt in many:
        if not (isinstance(prompt, str) or _are_tokens(prompt)):
            raise ValueError("a prompt is a text or a list of token ids; several are a list of these")
    return many


def _are_tokens(given: Any) -> bool:
    return (
        isinstance(given, list)
        and len(given) > 0
        and all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in given)
    )


def _stops(given: Any) -> list[str]:
    many = [given] if isinstance(given, str) else given
    if not isinstance(many, list) or not all(isinstance(text, str) and text for text in many):
        raise ValueError("give a text that is not empty, or a list of such")
    if len(many) > _MAX_STOP:
        raise ValueError(f"at most {_MAX_STOP} texts may end an answer")
    return many


_TOKENS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _TOKENS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_SAMPLES, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "maxItems": MAX_SAMPLES, "items": _TOKENS_SCHEMA},
    ]
}
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "maxItems": _MAX_STOP, "items": {"type": "string", "minLength": 1}},
    ]
}
Prompts = Annotated[list[Any], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Stops = Annotated[list[str], PlainValidator(_stops), WithJsonSchema(_STOP_SCHEMA)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    """A last piece with the numbers of tokens."""
    include_obfuscation: bool = False
    """OpenAI's padding of pieces; there is none here either way."""


class AskRequest(Strict):
    """What both routes understand."""

    model: str = Field(min_length=1, max_length=1024)
    """A finished model (`ft:…`), a checkpoint (`ft:…:ckpt-step-N`), or a base model of `/v1/models`."""
    n: int = Field(1, ge=1, le=MAX_N)
    """Answers to return for each prompt."""
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    """Answers to write for each prompt, of which the `n` best are returned: those with the highest reward
    where there is a `grader`, else those with the highest mean log-probability per token."""
    grader: GraderSection | None = None
    """How answers are graded, as in a job. Ours."""
    item: dict[str, JsonValue] = Field(default_factory=dict)
    """What the grader's templates call `item`: a reference, for example. Ours."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 = the likeliest token at every step."""
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stop: Stops = Field(default_factory=list)
    """Texts that end an answer, besides the model's own end tokens; they are not part of it."""
    seed: int | None = None
    """The same seed and request give the same answer, up to rounding that depends on who else is asking."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    """Taken, and not used."""


class CompletionRequest(AskRequest):
    """A text, or tokens, to be continued."""

    prompt: Prompts
    max_tokens: Tokens = 16
    logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probabilities of the answer's tokens, and of this many likeliest ones at each place."""


class TextPart(Strict):
    """Part of a message; texts are joined."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = Field(max_length=1_000_000)
    name: str | None = Field(None, max_length=256)

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(AskRequest):
    """A conversation to be continued."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: Tokens | None = None
    """Tokens of an answer; default: what the model has room for."""
    max_completion_tokens: Tokens | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    """Log-probabilities of the answer's tokens."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """And of this many likeliest ones at each place."""


R = TypeVar("R", bound=AskRequest)


def parse_request(model: type[R], body: Any) -> R:
    """Raises `ConfigError` and `RequestError` with the field's path. A field that is null counts as left away."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object.", mend="Send an object with `model`.")
    given = {key: value for key, value in body.items() if value is not None}
    unsupported = _NOT_FOR_CHATS if model is ChatRequest else _NOT_FOR_COMPLETIONS
    for name, neutral in unsupported.items():
        if name in given and not any(_same(given[name], value) for value in neutral):
            raise RequestError(
                f"{name} is not supported here.",
                param=name,
                mend="Leave it away.",
                code="unsupported_parameter",
            )
        given.pop(name, None)
    try:
        request = model.model_validate(given)
    except ValidationError as error:
        raise config_error(error) from None
    _check(request)
    return request


def _same(given: Any, value: Any) -> bool:
    return type(given) is type(value) and bool(given == value)


def _check(request: AskRequest) -> None:
    best_of = request.best_of or request.n
    if best_of < request.n:
        raise _refused(
            "best_of", f"{best_of} answers cannot give the best {request.n}.", "Raise it, or lower n."
        )
    if request.stream and (best_of > request.n or request.grader is not None):
        what = "grader" if request.grader is not None else "best_of"
        raise _refused("stream", f"with {what} it is not known which answer is the best before all are written.",
                       f"Leave stream or {what} away.")  # fmt: skip
    if request.stream_options is not None and not request.stream:
        raise _refused("stream_options", "there is no stream.", "Set stream to true.")
    if request.item and request.grader is None:
        raise _refused("item", "there is no grader to read it.", "Add a grader, or leave it away.")
    if isinstance(request, CompletionRequest):
        if len(request.prompt) * best_of > MAX_SAMPLES:
            raise _refused(
                "prompt", f"{len(request.prompt)} prompts with {best_of} answers each are more than {MAX_SAMPLES}.",
                "Ask in several requests.",
            )  # fmt: skip
    elif isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise _refused("top_logprobs", "logprobs is off.", "Set logprobs to true.")
        if request.max_tokens and request.max_completion_tokens:
            raise _refused("max_tokens", "max_completion_tokens is given as well.", "Keep one of them.")


def _refused(param: str, message: str, mend: str) -> RequestError:
    return RequestError(message, param=param, mend=mend, code="invalid_parameter")


class Usage(BaseModel):
    """Tokens read and written; of `best_of` answers all that were written, returned or not."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """By token of the answer; `text_offset` counts characters from its beginning."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer. `reward` where there was a grader and it could tell; else `reward_error` says why not."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    reward: float | None = None
    reward_error: str | None = None


class Completion(BaseModel):
    """The answers. `rewards` are those of all that were written, prompt by prompt."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    rewards: list[list[float | None]] | None = None


class TopLogprob(BaseModel):
    """A token, its log-probability in nats, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """By token of the answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer. `reward` where there was a grader and it could tell; else `reward_error` says why not."""

    index: int
    message: AnswerMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    reward: float | None = None
    reward_error: str | None = None


class ChatCompletion(BaseModel):
    """The answers. `rewards` are those of all that were written."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    rewards: list[list[float | None]] | None = None
