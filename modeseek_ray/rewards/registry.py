"""Graders of other packages: entry points of the group `modeseek_ray.graders`, named as users will write them.

    [project.entry-points."modeseek_ray.graders"]
    has_word = "my_package:has_word"

The function looks at any of `text`, `item` and `num_tokens` (its positional parameters, by name); keyword
defaults are its configuration; it returns a number, and may raise `SampleError` to say why there is none.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from importlib.metadata import entry_points

from modeseek_ray.rewards.grader import GradeItem
from modeseek_ray.strict import Strict, section

GradeFunction = Callable[..., float]
ENTRY_POINT_GROUP = "modeseek_ray.graders"
LOOKS_AT = frozenset({"text", "item", "num_tokens"})


def load_plug_ins(
    taken: Collection[str], base: type[Strict]
) -> dict[str, tuple[type[Strict], GradeFunction]]:
    """Type -> its section and function. One that cannot be loaded is warned about and left out.

    `taken` are the types there are already, which no plug-in may replace.
    """
    found: dict[str, tuple[type[Strict], GradeFunction]] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            if not point.name.isidentifier():
                raise ValueError(f"its name must be an identifier, not {point.name!r}")
            if point.name in taken or point.name in found:
                raise ValueError(f"there is already a grader {point.name!r}")
            function = point.load()
            unknown = set(positionals(function)) - LOOKS_AT
            if unknown:
                raise TypeError(
                    f"it asks for {', '.join(sorted(unknown))}; there are {', '.join(sorted(LOOKS_AT))}"
                )
            model = section("grader", point.name, function, base, by="type")
        except Exception as error:  # whatever another package's import raises
            warnings.warn(f"grader plug-in {point.value} left out: {error}", RuntimeWarning, stacklevel=2)
        else:
            found[point.name] = (model, function)
    return found


def positionals(function: GradeFunction) -> tuple[str, ...]:
    """Names of what a plug-in looks at."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds)


def bind(function: GradeFunction, configured: Strict) -> Callable[[GradeItem], float]:
    """The plug-in as a function of one sample, with its keywords filled from the user's section."""
    names = positionals(function)
    keywords = {name: getattr(configured, name) for name in type(configured).model_fields}
    accepted = set(inspect.signature(function).parameters) - set(names)
    keywords = {name: value for name, value in keywords.items() if name in accepted}

    def grade_one(item: GradeItem) -> float:
        return function(*(getattr(item, name) for name in names), **keywords)

    return grade_one
