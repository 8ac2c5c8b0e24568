"""What to do about a field that a schema refuses: the nearest name, the bounds, the values it takes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from modeseek_ray.strict import TAG_PREFIX

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_WORDS = {"min_length": "at least {} long", "max_length": "at most {} long"}


def mend_for(problem: Mapping[str, Any], model: type[BaseModel] | None = None) -> str:
    """A way out of one of `ValidationError.errors()`; never empty. `model` is what was validated."""
    kind, context, location = problem["type"], problem.get("ctx", {}), problem["loc"]
    if kind == "extra_forbidden":
        return _nearest(str(location[-1]), sorted(_fields_at(model, location[:-1])) if model else [])
    if kind.startswith("unknown_"):
        by = kind.removeprefix("unknown_")
        given = problem["input"].get(by) if isinstance(problem["input"], Mapping) else None
        return _nearest(str(given or ""), problem["msg"].partition(": ")[2].split(", "))
    if kind == "missing":
        return "Add it."
    if kind == "value_error":  # ours: what is wrong; what to do
        _, found, mend = problem["msg"].rpartition("; ")
        return f"{mend[0].upper()}{mend[1:]}." if found else "Change the fields it names."
    if kind == "literal_error":
        return _nearest(
            str(problem["input"]), re.findall("'([^']*)'", context["expected"]), context["expected"]
        )
    if "expected" in context:
        return f"Choose {context['expected']}."
    bounds = [f"{word} {context[name]:g}" for name, word in _BOUNDS.items() if name in context]
    if bounds:
        return f"Choose a number {' and '.join(bounds)}."
    lengths = [text.format(context[name]) for name, text in _WORDS.items() if name in context]
    if lengths:
        return f"Make it {' and '.join(lengths)}."
    if kind == "finite_number":
        return "Give a finite number."
    if kind.endswith("_type"):
        return f"Give a value of type {kind.removesuffix('_type')}, unquoted unless it is a string."
    return "The field's description in the service's /docs says what it takes."


def _nearest(given: str, known: Sequence[str], all_of_them: str = "") -> str:
    """The likeliest of the known names, or all of them."""
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    if all_of_them:
        return f"Choose {all_of_them}."
    return f"Choose among {', '.join(known)}." if known else "Leave it away."


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> set[str]:
    """Names of the fields that may stand at a place: those of every model that could be there."""
    models: list[type[BaseModel]] = [model]
    for part in map(str, location):
        if part.startswith(TAG_PREFIX):
            name = part.removeprefix(TAG_PREFIX)
            models = [m for m in models if name in m.model_fields or _is_called(m, name)] or models
        elif any(part in m.model_fields for m in models):
            annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
            models = [found for annotation in annotations for found in _models_in(annotation)]
    return {name for m in models for name in m.model_fields}


def _is_called(model: type[BaseModel], name: str) -> bool:
    """Whether a section's own name (its scheme or type) is this."""
    return any(name in get_args(field.annotation) for field in model.model_fields.values())


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model that a type mentions: members of unions, items of lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
