"""Records to rows: the four shapes of a row, its fields, their ranges. No tokenizer needed.

Chat:        {"messages": [{"role", "content", "weight"?}, …], "tools"?, …}
Completion:  {"prompt": …, "completion": …, …}
Tokens:      {"token_ids": […], "prompt_tokens": n, …}    (the rollouts of another job, as it wrote them)
Preference:  {"input": {"messages": […], "tools"?}, "preferred_output": […], "non_preferred_output": […]}

and on the first three: `weight` (prior, >= 0), `reward`, `group` (rows of one prompt share it), `logprobs`
(the sampler's, one number per trained token or their sum, nats), `id` (unique), `task` (a label),
and in validation and retention files `accept` (other right answers). A preference row (OpenAI's) may
have `weight`, `id` and `task`; it is parsed in `preference.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.data.preference import PREFERENCE_FIELDS, conversations
from modeseek_ray.data.reader import Record
from modeseek_ray.errors import DataError

Role = Literal["training", "replay", "validation", "retention"]
ROLES: tuple[Role, ...] = get_args(Role)
MAX_MAGNITUDE = 1e6
"""Largest |reward| and largest weight."""

_COMMON_FIELDS = {"weight", "id", "reward", "group", "logprobs", "task", "accept"}
_CHAT_FIELDS = _COMMON_FIELDS | {"messages", "tools", "parallel_tool_calls"}
_COMPLETION_FIELDS = _COMMON_FIELDS | {"prompt", "completion"}
_TOKENS_FIELDS = _COMMON_FIELDS | {"token_ids", "prompt_tokens"}
_TOKENS_FIELDS |= {"text", "error", "weight_version"}  # for people; not looked at
_MESSAGE_FIELDS = {"role", "content", "weight", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_ROLES_OF_MESSAGES = {"system", "developer", "user", "assistant", "tool", "function"}


@dataclass(frozen=True)
class Chat:
    """A conversation; `trained` says for each assistant message whether it is trained on."""

    messages: Sequence[Mapping[str, Any]]
    trained: Sequence[bool]
    tools: Any = None


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """What a generator was given and wrote, as it was: nothing is tokenised again."""

    token_ids_T: NDArray[np.int32]
    num_prompt: int


Answer = Chat | Completion | Tokens


@dataclass(frozen=True)
class Row:
    """A record that has passed every check that needs no tokenizer."""

    number: int  # line or record, counted from 0
    answers: Sequence[Answer]  # what the row says first, then each accepted alternative
    prior: float = 1.0
    reward: float | None = None
    group: str | int | None = None
    logprobs: float | Sequence[float] | None = None
    task: str = ""
    id: str | int | None = None
    is_graded: bool = False  # has a right answer that greedy decoding can be checked against
    rewards: Sequence[float] | None = None  # one per answer: a preference row, whose answers are a group


def parse_row(line: int, record: Record, role: Role = "training") -> Row:
    """Check one record. A null field counts as absent. Raises DataError with a code per kind of fault.

    A row of a validation or retention file is graded (greedy decoding has to write its answer) if
    it has `accept`, be it empty, or is a conversation that names its `task`; only the last assistant
    message of a graded conversation is the answer. Other rows are text to be predicted: they have a
    loss, but no right or wrong.

    >>> parse_row(0, {"prompt": "2+2=", "completion": "4", "reward": 1}).reward
    1.0
    """
    record = {key: value for key, value in record.items() if value is not None}
    if PREFERENCE_FIELDS & record.keys():
        return _preference_row(line, record, role)
    is_held_out = role in ("validation", "retention")
    accept = _accept(record, is_held_out)
    is_graded = accept is not None or (is_held_out and "messages" in record and "task" in record)
    answer = _answer(record, last_only=is_graded)
    return Row(
        number=line,
        answers=[answer, *(_replace_answer(answer, other) for other in accept or ())],
        prior=number_field(record, "weight", 1.0, least=0.0),
        reward=number_field(record, "reward", None),
        group=label_field(record, "group"),
        logprobs=_logprobs(record),
        task=text_field(record, "task", ""),
        id=label_field(record, "id"),
        is_graded=is_graded,
    )


def _preference_row(line: int, record: Record, role: Role) -> Row:
    """Two answers of one group, the preferred one rewarded; in held-out files the preferred one alone."""
    _refuse_unknown(record, PREFERENCE_FIELDS | {"weight", "id", "task"})
    answers = tuple(_chat(conversation, last_only=False) for conversation in conversations(record))
    is_pair = role == "training"
    return Row(
        number=line,
        answers=answers if is_pair else answers[:1],
        prior=number_field(record, "weight", 1.0, least=0.0),
        task=text_field(record, "task", ""),
        id=label_field(record, "id"),
        rewards=(1.0, 0.0) if is_pair else None,
    )


def _answer(record: Record, *, last_only: bool) -> Answer:
    if "token_ids" in record:
        return _tokens(record)
    if "messages" in record:
        if "prompt" in record or "completion" in record:
            raise DataError(
                "has both `messages` and `prompt` or `completion`.",
                mend="Keep one shape.",
                code="mixed_shapes",
            )
        _refuse_unknown(record, _CHAT_FIELDS)
        return _chat(record, last_only)
    _refuse_unknown(record, _COMPLETION_FIELDS)
    for name in ("prompt", "completion"):
        if name not in record:
            either = "" if {"prompt", "completion"} & set(record) else " (and no `messages`)"
            raise DataError(f"has no `{name}`{either}.", mend=f"Add `{name}`.", code="missing_field")
    completion = text_field(record, "completion", "")
    if not completion:
        raise DataError("`completion` is empty.", mend="Fill it or drop the row.", code="empty_completion")
    return Completion(text_field(record, "prompt", ""), completion)


def _chat(record: Record, last_only: bool) -> Chat:
    given = record["messages"]
    if not isinstance(given, list) or not given:
        raise DataError("`messages` is not a list of messages.", mend="Give at least two.", code="wrong_type")
    messages, trained = [], []
    for i, message in enumerate(given):
        if not isinstance(message, dict):
            raise DataError(
                f"messages[{i}] is not an object.", mend="Give role and content.", code="wrong_type"
            )
        message = {key: value for key, value in message.items() if value is not None}
        weight = _message_weight(message, i)
        messages.append(_message(message, i))
        if message["role"] == "assistant":
            trained.append(weight)
            if weight and not messages[-1]["content"] and "tool_calls" not in message:
                raise DataError(
                    f"messages[{i}], which is trained on, is empty.",
                    mend='Fill it, drop the row, or give the message "weight": 0.',
                    code="empty_completion",
                )
    if last_only and trained:
        trained[:-1] = [False] * (len(trained) - 1)
    if not any(trained):
        raise DataError(
            "no assistant message is trained on.",
            mend="Add one, or set a message's `weight` to 1.",
            code="no_trained_token",
        )
    return Chat(messages, trained, tools_field(record))


def parse_messages(given: Any) -> list[Mapping[str, Any]]:
    """The messages of a question, each checked. Raises DataError."""
    if not isinstance(given, list) or not given:
        raise DataError("`messages` is not a list of messages.", mend="Give at least one.", code="wrong_type")
    messages: list[Mapping[str, Any]] = []
    for i, message in enumerate(given):
        if not isinstance(message, dict):
            raise DataError(
                f"messages[{i}] is not an object.", mend="Give role and content.", code="wrong_type"
            )
        messages.append(_message({k: v for k, v in message.items() if v is not None}, i))
    return messages


def _tokens(record: Record) -> Tokens:
    """A recorded sample: `token_ids`, of which the first `prompt_tokens` are the question."""
    _refuse_unknown(record, _TOKENS_FIELDS)
    given, num_prompt = record["token_ids"], record.get("prompt_tokens")
    is_ids = isinstance(given, list) and all(type(t) is int and 0 <= t < 2**31 for t in given)
    if not is_ids or type(num_prompt) is not int or num_prompt < 0:
        raise DataError(
            "`token_ids` is no list of token ids, or `prompt_tokens` no count of them.",
            mend="Give both as a job's rollouts file has them.",
            code="wrong_type",
        )
    if num_prompt >= len(given):
        raise DataError("`token_ids` has nothing after the prompt.", mend="Drop it.", code="empty_completion")
    return Tokens(np.array(given, dtype=np.int32), num_prompt)


def _message(message: Record, i: int) -> dict[str, Any]:
    """The message as the template sees it: text parts joined, our own `weight` taken out."""
    _refuse_unknown(message, _MESSAGE_FIELDS, f"messages[{i}].")
    role = message.get("role")
    if role is None:
        raise DataError(f"messages[{i}] has no `role`.", mend="Add it.", code="missing_field")
    if not isinstance(role, str) or role not in _ROLES_OF_MESSAGES:
        raise DataError(
            f"messages[{i}].role is {str(role)[:32]!r}{_nearest(str(role), _ROLES_OF_MESSAGES)}.",
            mend=f"Use one of {', '.join(sorted(_ROLES_OF_MESSAGES))}.",
            code="wrong_type",
        )
    content = message.get("content")
    if content is None:
        if "tool_calls" not in message:
            raise DataError(f"messages[{i}] has no `content`.", mend="Add it.", code="missing_field")
        content = ""
    elif isinstance(content, list):
        content = _join_parts(content, i)
    elif not isinstance(content, str):
        raise DataError(f"messages[{i}].content is not text.", mend="Give a string.", code="wrong_type")
    kept = {key: value for key, value in message.items() if key not in ("weight", "content")}
    return {**kept, "content": content}


def _join_parts(parts: list[Any], i: int) -> str:
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise DataError(
                f"messages[{i}].content has a part that is not text.",
                mend='Only {"type": "text", "text": …} can be trained on.',
                code="wrong_type",
            )
        texts.append(part["text"])
    return "".join(texts)


def _message_weight(message: Record, i: int) -> bool:
    weight = message.get("weight")
    if weight is None:
        return True
    if message.get("role") != "assistant":
        raise DataError(
            f"messages[{i}] has a `weight`, but only assistant messages are trained on.",
            mend="Remove it.",
            code="bad_weight",
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f"messages[{i}].weight is {str(weight)[:32]}, not 0 or 1.",
            mend="A row's own `weight` may be any number from 0.",
            code="bad_weight",
        )
    return bool(weight)


def _accept(record: Record, is_held_out: bool) -> list[str] | None:
    if "accept" not in record:
        return None
    if not is_held_out:
        raise DataError(
            "`accept` has no meaning in rows that are trained on.",
            mend="Remove it; other right answers are rows of their own.",
            code="unknown_field",
        )
    accept = record["accept"]
    if not isinstance(accept, list) or not all(isinstance(a, str) and a for a in accept):
        raise DataError(
            "`accept` is no list of texts.", mend="List the other right answers.", code="wrong_type"
        )
    return list(dict.fromkeys(accept))


def _replace_answer(answer: Answer, text: str) -> Answer:
    if isinstance(answer, Tokens):
        raise DataError(
            "`accept` needs a row of `messages` or `prompt`.", mend="Remove it.", code="unknown_field"
        )
    if isinstance(answer, Completion):
        return Completion(answer.prompt, text)
    last = max(i for i, message in enumerate(answer.messages) if message["role"] == "assistant")
    messages = [*answer.messages]
    messages[last] = {**messages[last], "content": text}
    return Chat(messages, answer.trained, answer.tools)


def _logprobs(record: Record) -> float | list[float] | None:
    value = record.get("logprobs")
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if not _is_number(number):
            raise DataError(
                "`logprobs` is neither a number nor a list of numbers.",
                mend="Give one per trained token, or their sum.",
                code="wrong_type",
            )
        if not math.isfinite(number) or number > 0:
            raise DataError(
                f"`logprobs` holds {number}; a log-probability is finite and at most 0.",
                mend="Give natural logarithms of probabilities.",
                code="bad_logprobs",
            )
    return [float(n) for n in value] if isinstance(value, list) else float(value)


def number_field(record: Record, name: str, default: float | None, least: float = -MAX_MAGNITUDE) -> Any:
    """A finite number of ordinary size, at least `least`; `default` where there is none. Raises DataError."""
    value = record.get(name)
    if value is None:
        return default
    if not _is_number(value):
        raise DataError(f"`{name}` is not a number.", mend="Write a number.", code="wrong_type")
    if not math.isfinite(value):
        raise DataError(f"`{name}` is {value}.", mend="Drop the field or the row.", code="not_finite")
    if not least <= value <= MAX_MAGNITUDE:
        raise DataError(
            f"`{name}` is {value:g}, outside [{least:g}, {MAX_MAGNITUDE:g}].",
            mend="Rescale it.",
            code=f"bad_{name}",
        )
    return float(value)


def label_field(record: Record, name: str) -> str | int | None:
    """A text or an integer, or None. Raises DataError."""
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise DataError(f"`{name}` is neither text nor an integer.", mend="Write a label.", code="wrong_type")
    return value


def tools_field(record: Record) -> Any:
    """`tools`, a list of JSON schemas, or None."""
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise DataError("`tools` is not a list of objects.", mend="Give JSON schemas.", code="wrong_type")
    return tools


def text_field(record: Record, name: str, default: str) -> str:
    """A text; `default` where there is none. Raises DataError."""
    value = record.get(name, default)
    if not isinstance(value, str):
        raise DataError(f"`{name}` is not text.", mend="Write a string.", code="wrong_type")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_unknown(record: Record, known: set[str], prefix: str = "") -> None:
    for key in record.keys() - known:
        nearest = _nearest(key, known if prefix else known | _CHAT_FIELDS)
        raise DataError(
            f"has an unknown field `{prefix}{key[:64]}`{nearest}.",
            mend=f"Known fields: {', '.join(sorted(known))}.",
            code="unknown_field",
        )


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name[:64], sorted(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""
