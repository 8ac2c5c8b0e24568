"""From what the user wrote to something that grades; and what can be checked before the first sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from modeseek_ray.errors import ConfigError
from modeseek_ray.rewards.endpoints import Endpoint, endpoint_of
from modeseek_ray.rewards.expression import parse_formula
from modeseek_ray.rewards.grader import Grader, PerSample
from modeseek_ray.rewards.math_answer import MathGrader
from modeseek_ray.rewards.multi import MultiGrader
from modeseek_ray.rewards.parameters import (
    PLUG_INS,
    LengthPenalty,
    MathAnswer,
    Multi,
    ScoreModel,
    Section,
    StringCheck,
    TextSimilarity,
)
from modeseek_ray.rewards.registry import bind
from modeseek_ray.rewards.score_model import Classifier, ClassifierGrader, JudgeGrader
from modeseek_ray.rewards.similarity import text_similarity
from modeseek_ray.rewards.simple import length_penalty, string_check
from modeseek_ray.rewards.template import parse_template


def build_grader(
    section: Any, *, endpoints: Sequence[Endpoint] = (), classifier: Classifier | None = None
) -> Grader:
    """The grader of a section. Nothing is loaded, started or connected to before it is first asked.

    `endpoints` are the judges the operator allows; `classifier` is the pool of local models, for sections that
    `local_models` names. Raises `ConfigError` where a section needs what is not there.
    """
    return _build(section, "grader", endpoints, classifier)


def _build(section: Any, param: str, endpoints: Sequence[Endpoint], classifier: Classifier | None) -> Grader:
    match section:
        case StringCheck():
            return PerSample(string_check(section), lowest=0.0)
        case TextSimilarity():
            return PerSample(text_similarity(section), lowest=0.0)
        case MathAnswer():
            return MathGrader(section)
        case LengthPenalty():
            return PerSample(length_penalty(section))
        case ScoreModel():
            return _score_model(section, param, endpoints, classifier)
        case Multi(graders=graders, calculate_output=text):
            parts = {
                name: _build(part, f"{param}.graders.{name}", endpoints, classifier)
                for name, part in graders.items()
            }
            return MultiGrader(parts, parse_formula(text, parts))
    plug_in = PLUG_INS.get(getattr(section, "type", ""))
    if plug_in is None:
        raise TypeError(f"not the section of a grader: {section!r}")
    return PerSample(bind(plug_in[1], section))


def _score_model(
    section: ScoreModel, param: str, endpoints: Sequence[Endpoint], classifier: Classifier | None
) -> Grader:
    endpoint = endpoint_of(section, endpoints, param=param)
    if endpoint is not None:
        return JudgeGrader(section, endpoint)
    if classifier is None:
        raise ConfigError(
            f"{section.model!r} is no model of an allowed endpoint, and there are no scorers to load it.",
            param=f"{param}.model",
            mend="Set base_url to an endpoint that the operator allows, or give the directory of a classifier.",
        )
    return ClassifierGrader(section, classifier)


def local_models(
    section: Section, *, endpoints: Sequence[Endpoint] = (), param: str = "grader"
) -> list[tuple[str, ScoreModel]]:
    """The parts that want a sequence classifier loaded: where each stands in the job, and its section.

    Raises `ConfigError` for a `base_url` that the operator does not allow.
    """
    parts = [(param, section)]
    if isinstance(section, Multi):
        parts = [(f"{param}.graders.{name}", part) for name, part in section.graders.items()]
    return [
        (path, part)
        for path, part in parts
        if isinstance(part, ScoreModel) and endpoint_of(part, endpoints, param=path) is None
    ]


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
