from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeseek_ray.rewards import GradeItem, NotInSampleError, SampleError
from modeseek_ray.rewards.template import TemplateError, parse_template

ROW = {
    "reference": "Paris",
    "a": {"b": [10, {"c": "deep"}]},
    "flag": True,
    "n": 1.5,
    "none": None,
    "s-t": "x",
}


def render(template: str, text: str = "", row: dict[str, Any] = ROW) -> str:
    return parse_template(template).render(GradeItem(text, row, 1))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("no fields, { braces } and }}", "no fields, { braces } and }}"),
        ("{{item.reference}}", "Paris"),
        ("<{{ item.reference }}|{{sample.output_text}}>", "<Paris|an answer>"),
        ("{{ item.a.b[0] }}{{ item.a.b[1].c }}", "10deep"),
        ("{{ item.a }}", '{"b":[10,{"c":"deep"}]}'),
        ("{{ item.flag }} {{ item.n }}", "true 1.5"),
        ("{{ item.s-t }}", "x"),
    ],
)
def test_fields_are_filled_in(template: str, expected: str) -> None:
    assert render(template, "an answer") == expected


def test_what_is_filled_in_is_not_read_as_a_template() -> None:
    assert render("{{ sample.output_text }}", "{{ item.reference }}") == "{{ item.reference }}"


def test_json_answers_have_fields() -> None:
    text = '{"name": "Ada", "tags": ["x", 2]}'
    assert render("{{ sample.output_json.name }}{{ sample.output_json.tags[1] }}", text) == "Ada2"
    assert render("{{ sample.output_json }}", text) == '{"name":"Ada","tags":["x",2]}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {{ item.x", "position 3: '{{' is never closed"),
        ("{{ item.x }} {{{ ", "position 14: '{{' is never closed"),
        ("{{ itm.x }}", "position 1: 'itm' is unknown"),
        ("ab{{ item }}", "position 3: name a field"),
        ("{{ item[0] }}", "position 1: name a field"),
        ("{{ sample.text }}", "sample.text is unknown"),
        ("{{ sample.output_tools[0].name }}", "output_tools does not exist here"),
        ("{{ sample.output_text.x }}", "has no fields"),
        ("{{ item.x | upper }}", "is not of the form"),
        ("{{ item.x() }}", "is not of the form"),
        ("{{ item.__class__ }}", None),  # a name like any other: looked up in the row, never on an object
        ("{{ item['x'] }}", "is not of the form"),
        ("{{ }}", "is not of the form"),
        ("{{ item" + ".x" * 17 + " }}", "more than 16 names deep"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_position(template: str, message: str | None) -> None:
    if message is None:
        with pytest.raises(SampleError, match="there is no '__class__'"):
            render(template)
        return
    with pytest.raises(TemplateError) as caught:
        parse_template(template)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{{ item.x }}", "{{ item.a.b[7] }}", "{{ item.none }}", "{{ item.n.x }}"]
)
def test_what_the_row_lacks_is_the_row_s_error(template: str) -> None:
    with pytest.raises(SampleError) as caught:
        render(template)
    assert not isinstance(caught.value, NotInSampleError)
    assert template.strip("{} ") in str(caught.value)


@pytest.mark.parametrize("text", ["not JSON", "[1, 2]", '{"y": 1}', '{"x": null}', "[" * 10_000])
def test_what_the_answer_lacks_is_the_answer_s_fault(text: str) -> None:
    with pytest.raises(NotInSampleError):
        render("{{ sample.output_json.x }}", text)


@given(st.text(alphabet="{}item.sample_output_textjson[0] ", max_size=60), st.text(max_size=20))
def test_no_template_breaks_the_parser(template: str, answer: str) -> None:
    try:
        parsed = parse_template(template)
    except TemplateError:
        return
    with contextlib.suppress(SampleError):
        assert isinstance(parsed.render(GradeItem(answer, {"i": 1}, 1)), str)
