"""Graders as the user writes them: `grader: {type: string_check, …}`, with OpenAI's field names.

Everything that can be seen without a sample is refused here: a template with an unknown name, a formula that
cannot be read, a part of a `multi` that nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from keyword import iskeyword
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from modeseek_ray.rewards.expression import FUNCTIONS, parse_formula
from modeseek_ray.rewards.registry import load_plug_ins
from modeseek_ray.rewards.template import parse_template
from modeseek_ray.strict import Pair, Strict, one_of

_OUTPUT = "{{ sample.output_text }}"

_REFUSED = {
    "python": "graders written in Python would run a user's code on the operator's machines and are refused; "
    "combine the other types with `multi`, or have the operator install the code as a plug-in "
    "(modeseek_ray/rewards/README.md)",
    "label_model": "label_model is not offered; ask for a number with score_model",
}


def _readable(text: str) -> str:
    parse_template(text)
    return text


TemplateText = Annotated[str, Field(min_length=1, max_length=100_000), AfterValidator(_readable)]


class Section(Strict):
    """What all graders have. A plug-in's section is one of these with the function's keywords."""

    name: str = Field("", max_length=100)
    """A label for people; the parts of a `multi` are known by their keys instead."""

    def templates(self) -> Iterator[tuple[str, str]]:
        """Every template and the path of its field within this section."""
        yield from ()


class _TwoTexts(Section):
    def templates(self) -> Iterator[tuple[str, str]]:
        for path in ("input", "reference"):
            yield path, getattr(self, path)


class StringCheck(_TwoTexts):
    """1 if the comparison holds, else 0."""

    type: Literal["string_check"] = "string_check"
    input: TemplateText
    """What is looked at, as a rule `{{ sample.output_text }}`."""
    reference: TemplateText
    """What it is compared with, as a rule `{{ item.reference }}`."""
    operation: Literal["eq", "ne", "like", "ilike"]
    """eq: equal; ne: not equal; like: `input` contains `reference`; ilike: the same whatever the case."""


class TextSimilarity(_TwoTexts):
    """How much two texts are alike, from 0 to 1. `similarity.py` says what each metric is exactly."""

    type: Literal["text_similarity"] = "text_similarity"
    input: TemplateText
    """The text that is graded."""
    reference: TemplateText
    """The text it should be like."""
    evaluation_metric: Literal[
        "cosine",
        "fuzzy_match",
        "bleu",
        "gleu",
        "meteor",
        "rouge_1",
        "rouge_2",
        "rouge_3",
        "rouge_4",
        "rouge_5",
        "rouge_l",
    ]


class MathAnswer(_TwoTexts):
    """1 if the answer's final expression equals the reference's, else 0: 1/2, 0.5 and \\frac12 are one."""

    type: Literal["math_answer"] = "math_answer"
    input: TemplateText = _OUTPUT
    """The text whose last expression is the answer; `\\boxed{…}` comes first where there is one."""
    reference: TemplateText
    """The right answer, as LaTeX or a plain expression."""
    float_rounding: int = Field(6, ge=0, le=15)
    """Decimal places to which numbers that are not exact are compared."""
    strict: bool = True
    """Names of variables matter, and a set is no tuple."""
    timeout_s: float = Field(5.0, ge=0.1, le=60)
    """Longest time for one sample, in seconds; one that takes longer gets no grade."""


class LengthPenalty(Section):
    """0 up to `free_tokens`, then falling in a line to -`penalty` at `max_tokens`, and -`penalty` beyond.

    DAPO's soft overlong punishment (2503.14476). Of use within a `multi`.
    """

    type: Literal["length_penalty"] = "length_penalty"
    free_tokens: int = Field(ge=0, le=10_000_000)
    """Tokens of the answer that cost nothing."""
    max_tokens: int = Field(ge=1, le=10_000_000)
    """Tokens from which on the whole penalty is due."""
    penalty: float = Field(1.0, gt=0, le=1e6)
    """What is taken off at most, in reward units."""

    @model_validator(mode="after")
    def _order(self) -> LengthPenalty:
        if self.free_tokens >= self.max_tokens:
            raise ValueError(
                f"free_tokens ({self.free_tokens}) must be less than max_tokens ({self.max_tokens})"
            )
        return self


class TextBlock(Strict):
    """One block of a message's content, OpenAI's long form of a string."""

    type: Literal["input_text", "output_text"]
    text: TemplateText


def _only_text(value: Any) -> Any:
    for block in value if isinstance(value, list) else [value]:
        if isinstance(block, Mapping) and block.get("type") in ("input_image", "input_audio"):
            raise ValueError(f"{block['type']} is not offered; graders see text only")
    return value


class JudgeMessage(Strict):
    """A message to the judge, with templates in its content."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        TemplateText | TextBlock | Annotated[list[TemplateText | TextBlock], Field(min_length=1)],
        BeforeValidator(_only_text),
    ]
    type: Literal["message"] = "message"

    def text(self) -> str:
        """The content as one template; blocks stand on lines of their own."""
        blocks = self.content if isinstance(self.content, list) else [self.content]
        return "\n".join(block.text if isinstance(block, TextBlock) else block for block in blocks)


class SamplingParams(Strict):
    """How the judge is sampled; what is not set is left to its server."""

    max_completions_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """Most tokens the judge may write, reasoning included. (The plural is OpenAI's.)"""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)


class ScoreModel(Section):
    """A number from a model: a judge behind an OpenAI-compatible endpoint, or a local sequence classifier.

    Which it is: `base_url` names the endpoint; without it, an endpoint for which the operator lists this
    `model`; else `model` is the directory of a classifier.
    """

    type: Literal["score_model"] = "score_model"
    input: Annotated[list[JudgeMessage], Field(min_length=1, max_length=100)]
    """The conversation the model reads: instructions with the answer in them for a judge, the prompt and the
    answer as its last message for a classifier."""
    model: str = Field(min_length=1, max_length=500)
    """The judge's name at its endpoint, or the directory of a sequence classifier (safetensors)."""
    range: Pair | None = None
    """Lowest and highest score; scores beyond are cut. None = [0, 1] for a judge, no limit for a classifier."""
    sampling_params: SamplingParams = SamplingParams()
    base_url: str | None = Field(None, max_length=2000)
    """Root of the endpoint's API (`https://judge.example/v1`); only those the operator allows."""
    label: str | None = Field(None, max_length=200)
    """For a classifier with several labels: the one whose probability is the score."""

    @model_validator(mode="after")
    def _increasing(self) -> ScoreModel:
        if self.range is not None and not -1e6 <= self.range[0] < self.range[1] <= 1e6:
            raise ValueError("range must be [lowest, highest], both within a million of zero")
        if self.label is not None and self.base_url is not None:
            raise ValueError("label belongs to a local classifier, base_url to an endpoint; drop one of them")
        return self

    def templates(self) -> Iterator[tuple[str, str]]:
        for n, message in enumerate(self.input):
            yield f"input.{n}.content", message.text()


_SINGLE: dict[str, type[Section]] = {
    "string_check": StringCheck,
    "text_similarity": TextSimilarity,
    "math_answer": MathAnswer,
    "score_model": ScoreModel,
    "length_penalty": LengthPenalty,
}
PLUG_INS = load_plug_ins({*_SINGLE, *_REFUSED, "multi"}, Section)
_SINGLE |= {name: model for name, (model, _) in PLUG_INS.items() if issubclass(model, Section)}


def _refuse(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind in _REFUSED:
        raise ValueError(_REFUSED[kind])
    return value


def _no_multi(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("type") == "multi":
        raise ValueError("a multi stands in no other multi; list all graders in one and widen its formula")
    return _refuse(value)


if TYPE_CHECKING:  # the unions are built at run time, with the plug-ins
    SingleSection = Any
else:
    SingleSection = Annotated[one_of(_SINGLE, by="type"), BeforeValidator(_no_multi)]


class Multi(Section):
    """Several graders and a formula over their grades. A part that fails fails the sample."""

    type: Literal["multi"] = "multi"
    graders: dict[str, SingleSection] = Field(min_length=1, max_length=20)
    """The parts by the names the formula calls them."""
    calculate_output: str = Field(min_length=1, max_length=1000)
    """Numbers, names, + - * / ^ (or **), comparisons (1 or 0), min max abs floor ceil exp sqrt log."""

    @model_validator(mode="after")
    def _formula(self) -> Multi:
        for name in self.graders:
            if not name.isascii() or not name.isidentifier() or name in FUNCTIONS or iskeyword(name):
                raise ValueError(
                    f"graders.{name}: a part needs a name of letters, digits and _ that is no function or keyword"
                )
        try:
            used = parse_formula(self.calculate_output, self.graders).names
        except ValueError as error:
            raise ValueError(f"calculate_output: {error}") from None
        unused = sorted(set(self.graders) - used)
        if unused:
            raise ValueError(
                f"calculate_output does not use {', '.join(unused)}; drop it, "
                f"or write 0 * {unused[0]} to keep its grade on record"
            )
        return self

    def templates(self) -> Iterator[tuple[str, str]]:
        for name, part in self.graders.items():
            for path, text in part.templates():
                yield f"graders.{name}.{path}", text


SECTIONS: dict[str, type[Section]] = {**_SINGLE, "multi": Multi}

if TYPE_CHECKING:
    GraderSection = Any
else:
    GraderSection = Annotated[one_of(SECTIONS, by="type"), BeforeValidator(_refuse)]
"""Any grader, told apart by `type`: the field of a method is annotated with this."""
