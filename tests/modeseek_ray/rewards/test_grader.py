"""The graders that need no library, how they combine, and what happens when a sample cannot be graded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter

from modeseek_ray.config import config_error
from modeseek_ray.errors import ConfigError
from modeseek_ray.rewards import (
    Grade,
    GradeItem,
    GraderError,
    GraderSection,
    SampleError,
    build_grader,
    check_grader,
    refuse_if_failing,
)
from modeseek_ray.rewards.grader import PerSample

SECTION: TypeAdapter[Any] = TypeAdapter(GraderSection)
EQUALS = {
    "type": "string_check",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.reference }}",
    "operation": "eq",
}
TOO_LONG = {"type": "length_penalty", "free_tokens": 10, "max_tokens": 20}
BOTH = {
    "type": "multi",
    "graders": {"right": EQUALS, "long": TOO_LONG},
    "calculate_output": "2 * right + long",
}


async def grades(section: Mapping[str, Any], *items: GradeItem) -> list[Grade]:
    grader = build_grader(SECTION.validate_python(section))
    try:
        return await grader.grade(items)
    finally:
        await grader.close()


def answer(text: str, num_tokens: int = 5, **row: Any) -> GradeItem:
    return GradeItem(text, row, num_tokens)


@pytest.mark.parametrize(
    ("operation", "text", "reference", "expected"),
    [
        ("eq", "Paris", "Paris", 1.0),
        ("eq", "paris", "Paris", 0.0),
        ("eq", "Paris ", "Paris", 0.0),
        ("ne", "paris", "Paris", 1.0),
        ("ne", "Paris", "Paris", 0.0),
        ("like", "It is Paris.", "Paris", 1.0),
        ("like", "It is paris.", "Paris", 0.0),
        ("like", "Paris", "It is Paris.", 0.0),
        ("ilike", "It is paris.", "Paris", 1.0),
        ("ilike", "HAUPTSTRASSE 1", "Hauptstraße", 1.0),
        ("ilike", "London", "Paris", 0.0),
    ],
)
async def test_string_check(operation: str, text: str, reference: str, expected: float) -> None:
    [grade] = await grades({**EQUALS, "operation": operation}, answer(text, reference=reference))
    assert grade == Grade(expected)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0.0), (10, 0.0), (15, -2.0), (18, -3.2), (20, -4.0), (99, -4.0)]
)
async def test_length_penalty(num_tokens: int, expected: float) -> None:
    [grade] = await grades({**TOO_LONG, "penalty": 4.0}, answer("", num_tokens))
    assert grade.reward == pytest.approx(expected)
    assert str(grade.reward) != "-0.0"


async def test_multi_combines_and_keeps_the_parts() -> None:
    found = await grades(BOTH, answer("yes", 15, reference="yes"), answer("no", 30, reference="yes"))
    assert found == [
        Grade(1.5, parts={"right": 1.0, "long": -0.5}),
        Grade(-1.0, parts={"right": 0.0, "long": -1.0}),
    ]


async def test_a_part_that_fails_fails_its_sample_alone_by_name() -> None:
    found = await grades(BOTH, answer("yes", 15), answer("yes", 15, reference="yes"))
    assert found == [
        Grade(None, "right: item.reference: there is no 'reference'", parts={"long": -0.5}),
        Grade(1.5, parts={"right": 1.0, "long": -0.5}),
    ]


async def test_a_formula_without_a_value_fails_the_sample() -> None:
    section = {**BOTH, "calculate_output": "long / right"}
    [grade] = await grades(section, answer("no", 15, reference="yes"))
    assert grade.reward is None
    assert grade.error == (
        "calculate_output has no value (float division by zero) for long = -0.5, right = 0"
    )
    assert grade.parts == {"right": 0.0, "long": -0.5}


async def test_an_answer_without_what_is_looked_at_gets_the_lowest_grade() -> None:
    section = {**EQUALS, "operation": "ne", "input": "{{ sample.output_json.city }}"}
    found = await grades(
        section, answer('{"city": "Rome"}', reference="Paris"), answer("Rome", reference="Paris")
    )
    assert found == [Grade(1.0), Grade(0.0)]


async def test_whatever_a_grader_raises_or_returns_is_one_sample_s_error() -> None:
    def odd(item: GradeItem) -> Any:
        match item.text:
            case "raise":
                raise ZeroDivisionError("at 7")
            case "say why":
                raise SampleError("the judge is asleep")
            case "nan":
                return float("nan")
            case "huge":
                return 1e7
            case "text":
                return "good"
            case "endless":
                raise SampleError("x" * 5000)
        return True

    texts = ["raise", "say why", "nan", "huge", "text", "endless", "fine"]
    found = await PerSample(odd).grade([answer(text) for text in texts])
    assert [grade.error and grade.error[:60] for grade in found[:5]] == [
        "ZeroDivisionError: at 7",
        "the judge is asleep",
        "a grade must be between -1e+06 and 1e+06, not nan",
        "a grade must be between -1e+06 and 1e+06, not 1e+07",
        "a grade must be a number, not 'good'",
    ]
    assert len(found[5].error or "") == 502
    assert found[6] == Grade(1.0)


def test_a_grade_is_a_finite_reward_or_an_error() -> None:
    for reward, error in (
        (None, None),
        (1.0, "why"),
        (float("nan"), None),
        (float("inf"), None),
        (2e6, None),
    ):
        with pytest.raises(ValueError, match="a grade has|a reward must"):
            Grade(reward, error)


def test_a_job_stops_above_its_share_with_three_different_examples() -> None:
    found = [Grade(None, f"reason {n // 2}") for n in range(8)] + [Grade(1.0)] * 2
    refuse_if_failing(found, 0.8)
    refuse_if_failing([], 0.0)
    refuse_if_failing([Grade(0.0)], 0.0)
    with pytest.raises(GraderError) as caught:
        refuse_if_failing(found, 0.7)
    assert caught.value.code == "grader_failing"
    assert str(caught.value) == (
        "8 of 10 samples could not be graded, more than the share of 0.7 allowed: sample 0: reason 0; "
        "sample 2: reason 1; sample 4: reason 2. "
        "Mend the grader or the rows it reads; or raise `max_failed_share`."
    )


@pytest.mark.parametrize(
    ("section", "path", "said"),
    [
        ({"type": "python", "source": "def grade(): ..."}, None, "would run a user's code"),
        ({"type": "label_model"}, None, "Ask for a number with score_model"),
        ({"type": "string_chek"}, "type", "`type` must be one of: string_check, text_similarity"),
        ({}, "type", "`type` must be one of"),
        ({**EQUALS, "operation": "neq"}, "operation", "'neq' is not one of its choices. Did you mean `ne`?"),
        ({**EQUALS, "pass_threshold": 1}, "pass_threshold", "there is no such field"),
        ({**EQUALS, "input": "{{ sample.txt }}"}, "input", "position 1: sample.txt is unknown"),
        ({**TOO_LONG, "free_tokens": 20}, None, "must be less than max_tokens (20)"),
        ({**BOTH, "calculate_output": "right + lang"}, None, "position 9: 'lang' is not a grader"),
        ({**BOTH, "calculate_output": "right"}, None, "does not use long. Drop it, or write 0 * long"),
        ({**BOTH, "graders": {}}, "graders", "at least 1"),
        ({**BOTH, "graders": {"max": EQUALS}}, None, "graders.max: a part needs a name"),
        ({**BOTH, "graders": {"in": EQUALS}}, None, "graders.in: a part needs a name"),
        ({**BOTH, "graders": {"x": BOTH}}, "graders.x", "stands in no other multi"),
        ({**BOTH, "graders": {"x": {"type": "python"}}}, "graders.x", "would run a user's code"),
        (
            {**BOTH, "graders": {"x": {**EQUALS, "reference": "{{ x }}"}}},
            "graders.x.reference",
            "'x' is unknown",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(
    section: Mapping[str, Any], path: str | None, said: str
) -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        SECTION.validate_python(section)
    error = config_error(caught.value)  # type: ignore[arg-type]
    assert error.param == path
    assert said in f"{error.message} {error.mend}" and error.mend


def test_a_field_that_no_row_has_is_refused_at_submission() -> None:
    section = SECTION.validate_python(BOTH)
    check_grader(section, fields=["messages", "reference"])
    with pytest.raises(ConfigError) as caught:
        check_grader(section, fields=["messages", "answer"], param="method.online.grader")
    assert caught.value.param == "method.online.grader.graders.right.reference"
    assert str(caught.value).endswith(
        "{{ item.reference }}: no row has a field 'reference'. The rows have: answer, messages."
    )
