"""Templates: `{{ item.reference }}`, `{{ sample.output_text }}`, `{{ item.tests[0].name }}`.

A little parser and look-ups, nothing else: no filters, no calls, no attributes of Python objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modeseek_ray.rewards.grader import GradeItem, NotInSampleError, SampleError

MAX_DEPTH = 16
_FIELD = re.compile(r"\s*(?P<path>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*|\[\d{1,6}\])*)\s*")
_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+)\]")
_NOT_SAMPLED = ("output_tools", "choices", "output_audio")


class TemplateError(ValueError):
    """A template that cannot be read. The message names the position, counted from 1."""


@dataclass(frozen=True)
class Field:
    """One `{{ … }}`: where it looks, and the keys (names, or positions in a list) it follows."""

    namespace: Literal["item", "sample"]
    keys: tuple[str | int, ...]
    path: str  # as it was written

    def value(self, item: GradeItem) -> Any:
        """What stands there. Raises `SampleError` where the row lacks it, `NotInSampleError` for the answer."""
        if self.namespace == "item":
            return self._follow(item.item, self.keys, SampleError)
        if self.keys[0] == "output_text":
            return item.text
        try:
            document = json.loads(item.text)
        except (ValueError, RecursionError):
            raise NotInSampleError(f"{self.path}: the answer is not JSON") from None
        return self._follow(document, self.keys[1:], NotInSampleError)

    def _follow(self, value: Any, keys: tuple[str | int, ...], error: type[SampleError]) -> Any:
        for key in keys:
            wanted = Mapping if isinstance(key, str) else list | tuple
            try:
                if not isinstance(value, wanted):
                    raise KeyError(key)
                value = value[key]  # type: ignore[index]
            except LookupError:
                raise error(f"{self.path}: there is no {key!r}") from None
        if value is None:
            raise error(f"{self.path} is null")
        return value


@dataclass(frozen=True)
class Template:
    """Literal text and fields, in order.

    >>> parse_template("The answer is {{ item.a.b }}.").render(GradeItem("", {"a": {"b": 4}}, 1))
    'The answer is 4.'
    """

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(part for part in self.parts if isinstance(part, Field))

    def render(self, item: GradeItem) -> str:
        """Strings as they are, everything else as compact JSON. Raises as `Field.value` does."""
        return "".join(part if isinstance(part, str) else _text(part.value(item)) for part in self.parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parse_template(text: str) -> Template:
    """Read a template. Raises `TemplateError` with the position and what is expected there."""
    parts: list[str | Field] = []
    start = 0
    while (opening := text.find("{{", start)) >= 0:
        closing = text.find("}}", opening)
        if closing < 0:
            raise TemplateError(f"position {opening + 1}: '{{{{' is never closed by '}}}}'")
        if opening > start:
            parts.append(text[start:opening])
        parts.append(_parse_field(text[opening + 2 : closing], opening + 1))
        start = closing + 2
    if start < len(text):
        parts.append(text[start:])
    return Template(tuple(parts))


def _parse_field(inside: str, position: int) -> Field:
    match = _FIELD.fullmatch(inside)
    if match is None:
        raise TemplateError(
            f"position {position}: {{{{{_cut(inside)}}}}} is not of the form {{{{ item.name }}}} or "
            f"{{{{ sample.output_text }}}}; write a path of names and [numbers]"
        )
    path = match["path"]
    namespace = re.split(r"[.\[]", path, maxsplit=1)[0]
    steps = _STEP.findall(path[len(namespace) :])
    keys: tuple[str | int, ...] = tuple(name or int(number) for name, number in steps)
    if namespace not in ("item", "sample"):
        raise TemplateError(
            f"position {position}: {namespace!r} is unknown; there are `item` (the row) and `sample`"
        )
    if not keys or isinstance(keys[0], int):
        raise TemplateError(f"position {position}: name a field, as in {{{{ {namespace}.name }}}}")
    if len(keys) > MAX_DEPTH:
        raise TemplateError(f"position {position}: more than {MAX_DEPTH} names deep")
    if namespace == "item":
        return Field("item", keys, path)
    _check_sample(keys, position)
    return Field("sample", keys, path)


def _check_sample(keys: tuple[str | int, ...], position: int) -> None:
    if keys[0] in _NOT_SAMPLED:
        raise TemplateError(
            f"position {position}: sample.{keys[0]} does not exist here, models are sampled as plain text; "
            f"use sample.output_text, or sample.output_json for an answer that is JSON"
        )
    if keys[0] not in ("output_text", "output_json"):
        raise TemplateError(
            f"position {position}: sample.{keys[0]} is unknown; "
            f"there are sample.output_text and sample.output_json"
        )
    if keys[0] == "output_text" and len(keys) > 1:
        raise TemplateError(f"position {position}: sample.output_text is a text and has no fields")


def _cut(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
