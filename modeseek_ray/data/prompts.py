"""Rows that are questions only: what an online or best-of-n job lets the generator answer.

{"messages": [… up to the question], …} or {"prompt": …, …}. Every other field belongs to the row's
*item*, which graders compare with (`{{ item.reference }}`); none is unknown. `weight` (prior, >= 0),
`id` and `task` mean what they mean in other files, and are in the item too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeseek_ray.data.parsing import parse_records
from modeseek_ray.data.problems import Problems, raise_first
from modeseek_ray.data.reader import Record
from modeseek_ray.data.rows import label_field, number_field, parse_messages, text_field, tools_field
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError
from modeseek_ray.types import Prompt


@dataclass(frozen=True)
class PromptRow:
    """A question that has passed every check that needs no tokenizer."""

    number: int  # line or record, counted from 0
    question: str | Sequence[Mapping[str, Any]]  # a text, or messages
    prior: float = 1.0
    id: str | int | None = None
    task: str = ""
    tools: Any = None
    item: Mapping[str, Any] = field(default_factory=dict)


def parse_prompt(line: int, record: Record) -> PromptRow:
    """Check one record. Raises DataError with a code per kind of fault.

    >>> parse_prompt(0, {"prompt": "2+2=", "reference": "4"}).item
    {'reference': '4'}
    """
    record = {key: value for key, value in record.items() if value is not None}
    if ("messages" in record) == ("prompt" in record):
        raise DataError(
            "needs `messages` or `prompt`, and not both.",
            mend="Give the question as one of them; the answer is written by the generator.",
            code="mixed_shapes" if "messages" in record else "missing_field",
        )
    if "completion" in record:
        raise DataError(
            "has a `completion`, but the generator writes the answers.",
            mend="Call it `reference` if the grader compares with it, or choose method.type: weighted.",
            code="unknown_field",
        )
    return PromptRow(
        number=line,
        question=_messages(record["messages"]) if "messages" in record else text_field(record, "prompt", ""),
        prior=number_field(record, "weight", 1.0, least=0.0),
        id=label_field(record, "id"),
        task=text_field(record, "task", ""),
        tools=tools_field(record),
        item={key: value for key, value in record.items() if key not in ("messages", "prompt", "tools")},
    )


def _messages(given: Any) -> list[Mapping[str, Any]]:
    messages = parse_messages(given)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "`messages` ends with the assistant's answer, which the generator is to write.",
            mend="End with the user's message; give the answer as `reference`, if the grader compares with it.",
            code="wrong_type",
        )
    return messages


def read_prompts(path: Path | str, problems: Problems) -> Iterator[PromptRow]:
    """The sound rows of a file; what is wrong with the others goes into `problems`."""
    return parse_records(path, problems, parse_prompt)


def encode_prompt(row: PromptRow, tokenizer: ChatTokenizer, max_tokens: int | None) -> Prompt:
    """Tokens of a question, with room for the answer. Raises DataError where they are too many or none.

    `max_tokens`: most tokens of a question (None = no limit).
    """
    question = row.question if isinstance(row.question, str) else list(row.question)
    token_ids_T = tokenizer.encode_prompt(question, row.tools)
    if len(token_ids_T) == 0:
        raise DataError(
            "the question has no token.", mend="Fill it, or drop the row.", code="empty_completion"
        )
    if max_tokens is not None and len(token_ids_T) > max_tokens:
        raise DataError(
            f"the question has {len(token_ids_T)} tokens; beside the answer's room there are {max_tokens}.",
            mend="Shorten it, or lower rollout.max_tokens.",
            code="too_long",
        )
    return Prompt(ordinal=row.number, token_ids_T=token_ids_T, reference=row.item)


def load_prompts(path: Path | str, tokenizer: ChatTokenizer, *, max_tokens: int | None) -> list[Prompt]:
    """All prompts of a file, in file order. Raises DataError for the first problem, counting the others."""
    problems = Problems(str(path))
    prompts = []
    for row in read_prompts(path, problems):
        try:
            prompts.append(encode_prompt(row, tokenizer, max_tokens))
        except DataError as error:
            problems.add(error, row.number + 1)
    raise_first([problems])
    return prompts
