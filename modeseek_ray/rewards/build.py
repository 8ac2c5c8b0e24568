"""From what the user wrote to something that grades; and what can be checked before the first sample."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from modeseek_ray.errors import ConfigError
from modeseek_ray.rewards.expression import parse_formula
from modeseek_ray.rewards.grader import Grader, PerSample
from modeseek_ray.rewards.math_answer import MathGrader
from modeseek_ray.rewards.multi import MultiGrader
from modeseek_ray.rewards.parameters import (
    PLUG_INS,
    LengthPenalty,
    MathAnswer,
    Multi,
    Section,
    StringCheck,
    TextSimilarity,
)
from modeseek_ray.rewards.registry import bind
from modeseek_ray.rewards.similarity import text_similarity
from modeseek_ray.rewards.simple import length_penalty, string_check
from modeseek_ray.rewards.template import parse_template


def build_grader(section: Any) -> Grader:
    """The grader of a section. Nothing is loaded, started or connected to before it is first asked."""
    match section:
        case StringCheck():
            return PerSample(string_check(section), lowest=0.0)
        case TextSimilarity():
            return PerSample(text_similarity(section), lowest=0.0)
        case MathAnswer():
            return MathGrader(section)
        case LengthPenalty():
            return PerSample(length_penalty(section))
        case Multi(graders=graders, calculate_output=text):
            parts = {name: build_grader(part) for name, part in graders.items()}
            return MultiGrader(parts, parse_formula(text, parts))
    plug_in = PLUG_INS.get(getattr(section, "type", ""))
    if plug_in is None:
        raise TypeError(f"not the section of a grader: {section!r}")
    return PerSample(bind(plug_in[1], section))


def check_grader(section: Section, *, fields: Collection[str], param: str = "grader") -> None:
    """Refuse templates that read a field no row has. `fields` are the names the rows of the job have.

    Raises `ConfigError`, at submission: `param` is where the section stands in the job.
    """
    for path, text in section.templates():
        for field in parse_template(text).fields:
            if field.namespace == "item" and field.keys[0] not in fields:
                raise ConfigError(
                    f"{{{{ {field.path} }}}}: no row has a field {field.keys[0]!r}.",
                    param=f"{param}.{path}",
                    mend=f"The rows have: {', '.join(sorted(fields)) or 'no further fields'}.",
                )
