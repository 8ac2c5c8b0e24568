"""OpenAI's preference rows, as the two conversations they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeseek_ray.data.reader import Record
from modeseek_ray.errors import DataError

OUTPUTS = ("preferred_output", "non_preferred_output")
PREFERENCE_FIELDS = {"input", *OUTPUTS}
_INPUT_FIELDS = {"messages", "tools", "parallel_tool_calls"}
_SPEAKERS = ("assistant", "tool")


def conversations(record: Record) -> tuple[Record, Record]:
    """The preferred conversation and the other, as chat records in which the output alone is trained on.

    The prompt's own assistant messages are not trained on. Raises DataError with a code per fault.

    >>> row = {"input": {"messages": [{"role": "user", "content": "2+2?"}]},
    ...        "preferred_output": [{"role": "assistant", "content": "4"}],
    ...        "non_preferred_output": [{"role": "assistant", "content": "5"}]}
    >>> [c["messages"][-1]["content"] for c in conversations(row)]
    ['4', '5']
    """
    for name in ("input", *OUTPUTS):
        if name not in record:
            raise DataError(f"has no `{name}`.", mend=f"Add `{name}`.", code="missing_field")
    given = record["input"]
    if not isinstance(given, Mapping) or not isinstance(given.get("messages"), list):
        raise DataError(
            "`input` has no list of `messages`.",
            mend='Give {"messages": [{"role": "user", "content": …}]}.',
            code="wrong_type",
        )
    if unknown := sorted(given.keys() - _INPUT_FIELDS):
        raise DataError(
            f"has an unknown field `input.{unknown[0][:64]}`.",
            mend=f"Known fields: {', '.join(sorted(_INPUT_FIELDS))}.",
            code="unknown_field",
        )
    prompt = [_untrained(message) for message in given["messages"]]
    tools = {} if not given.get("tools") else {"tools": given["tools"]}
    preferred, other = (_output(record, name) for name in OUTPUTS)
    if preferred == other:
        raise DataError(
            "`preferred_output` and `non_preferred_output` are the same.",
            mend="Drop the row: it says nothing.",
            code="equal_outputs",
        )
    return {"messages": [*prompt, *preferred], **tools}, {"messages": [*prompt, *other], **tools}


def _untrained(message: Any) -> Any:
    if isinstance(message, Mapping) and message.get("role") == "assistant":
        return {**message, "weight": 0}
    return message


def _output(record: Record, name: str) -> list[Any]:
    """Messages of the assistant, perhaps with tools answering between."""
    messages = record[name]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"`{name}` is not a list of messages.",
            mend='Give [{"role": "assistant", "content": …}].',
            code="wrong_type",
        )
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if "assistant" not in roles or any(role not in _SPEAKERS for role in roles):
        raise DataError(
            f"`{name}` holds messages of {', '.join(str(role)[:32] for role in roles)}.",
            mend="Give the assistant's messages, with its tools' answers if there are any.",
            code="wrong_type",
        )
    return messages
