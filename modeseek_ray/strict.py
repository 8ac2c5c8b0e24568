"""The base of every model a user fills in, and how a section is derived from a plain function.

It stands below `weights` and `config`, which both build on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model

# Union tags that stand in pydantic's error locations but not in the user's document.
TAG_PREFIX = "tagged-"

# Strict models refuse a list where a tuple is meant; documents have only lists. The entries stay strict.
Pair = Annotated[tuple[float, float], Field(strict=False)]


class Strict(BaseModel):
    """No unknown fields, no coercion, no NaN or infinity, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class ConfiguredAs:
    """In a scheme's signature: what the user writes where the function takes a solved number.

    `beta: Annotated[float, ConfiguredAs(BetaSetting)] = 1.0` takes a float, and the user may also
    write `{ess: {floor: 0.3}}`, from which the number is found before the function is called.
    """

    setting: Any


def section(
    group: str, name: str, function: Callable[..., Any], base: type[Strict] = Strict, *, by: str = "scheme"
) -> type[Strict]:
    """The pydantic model of one scheme: `scheme: name`, and the function's keyword defaults.

    `by` is the field that names it where that is not `scheme`.

    Every keyword-only parameter needs an annotation and a default; the docstring becomes the
    description. Raises `TypeError` where one is missing.
    """
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {by: (Literal[name], name)}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.name not in hints or parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{group} {by} {name!r}: parameter {parameter.name!r} needs a type and a default")
        fields[parameter.name] = (_configured(hints[parameter.name]), parameter.default)
    title = "".join(word.capitalize() for word in f"{group}_{name}".split("_"))
    return create_model(
        title,
        __base__=base,
        __doc__=inspect.getdoc(function),
        __module__=__name__,
        # There is no class statement to read docstrings from, and looking for one takes a look at every
        # loaded module: seconds in a process that has torch.
        __cls_kwargs__={"use_attribute_docstrings": False},
        **fields,
    )


def _configured(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        for extra in get_args(hint)[1:]:
            if isinstance(extra, ConfiguredAs):
                return extra.setting
    return hint


def one_of(sections: Mapping[str, type[Strict]], *, by: str = "scheme") -> Any:
    """The union of sections, told apart by the field `by`."""

    def tag_of(value: Any) -> str | None:
        name = value.get(by) if isinstance(value, Mapping) else getattr(value, by, None)
        return None if name is None else f"{TAG_PREFIX}{name}"

    tagged = [Annotated[model, Tag(TAG_PREFIX + name)] for name, model in sections.items()]
    message = f"`{by}` must be one of: {', '.join(sections)}"
    tag = Discriminator(tag_of, custom_error_type=f"unknown_{by}", custom_error_message=message)
    return Annotated[Union[tuple(tagged)], tag]  # noqa: UP007 - built at run time


def error_path(location: Sequence[int | str]) -> str:
    """A pydantic error location as the path in the user's document.

    >>> error_path(("likelihood", "tagged-ratio_power", "gamma", "tagged-ess", "ess", "floor"))
    'likelihood.gamma.ess.floor'
    """
    return ".".join(part for part in map(str, location) if not part.startswith((TAG_PREFIX, "function-")))
