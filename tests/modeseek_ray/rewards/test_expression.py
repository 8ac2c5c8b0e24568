from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modeseek_ray.rewards import SampleError
from modeseek_ray.rewards.expression import FormulaError, parse_formula

NAMES = ("a", "b", "long_name")
VALUES = {"a": 0.5, "b": -2.0, "long_name": 3.0}


def value(text: str, **more: float) -> float:
    values = {**VALUES, **more}
    return parse_formula(text, values)(values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(a + 1) / 2", 0.75),
        ("0.5 * a + 0.5 * long_name", 1.75),
        ("b ^ 2 ^ 0 - b ** 2", -6.0),  # b^(2^0) - b^2
        ("-2 ^ 2", -4.0),
        ("a*2^long_name", 4.0),  # Python's own ^ would bind loosest of all
        ("min(a, b, 1) + max(a, b)", -1.5),
        ("abs(b) + floor(2.7) + ceil(2.1)", 7.0),
        ("exp(0) + sqrt(4) + log(exp(1))", 4.0),
        ("a > 0", 1.0),
        ("(a > 0) * (b > 0)", 0.0),
        ("0 < a <= 0.5", 1.0),
        ("a == 0.5", 1.0),
        ("a != 0.5", 0.0),
        ("  a\n + 1 ", 1.5),
        ("1e-3 + .5 + 1.", 1.501),
    ],
)
def test_formulas(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "position", "said"),
    [
        ("a + c", 5, "'c' is not a grader; there are: a, b, long_name"),
        ("a + __import__('os')", 16, "has no meaning"),
        ("a.real", 1, "only numbers"),
        ("(a).real", 1, "only numbers"),
        ("a ^ 2 + c", 9, "'c' is not a grader"),  # ^ becomes two characters; positions stay the user's
        (" a +", 5, "cannot be read"),
        ("a b", 3, "cannot be read"),
        ("a + open(b)", 5, "no function 'open'"),
        ("a + sqrt(a, b)", 5, "takes 1 argument, not 2"),
        ("min(a)", 1, "at least 2 arguments"),
        ("a if b else a", 1, "only numbers"),
        ("a and b", 1, "only numbers"),
        ("not a", 1, "only numbers"),
        ("a // b", 1, "only numbers"),
        ("a is b", 1, "only numbers"),
        ("a + (b, a)", 5, "only numbers"),
        ("min(*a, b)", 5, "only numbers"),
        ("True", 1, "only numbers"),
        ("a + 0x10", 5, "not a decimal number"),
        ("a + 1_000", 5, "not a decimal number"),
        ("2j * a", 1, "not a decimal number"),
        ("a + 1e200", 5, "larger than"),
        ("[a]", 1, "has no meaning"),
        ("a; b", 2, "has no meaning"),
        ("lambda: a", 7, "has no meaning"),
        ("ä", 1, "has no meaning"),
    ],
)
def test_everything_else_is_refused_with_its_position(text: str, position: int, said: str) -> None:
    with pytest.raises(FormulaError) as caught:
        parse_formula(text, NAMES)
    assert f"position {position}:" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", " ", "(" * 300 + "a" + ")" * 300, "-" * 900 + "a", "+".join(["a"] * 150), "a" * 1001]
)
def test_nothing_deep_or_long_gets_through(text: str) -> None:
    with pytest.raises(FormulaError):
        parse_formula(text, NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "1 / (a - 0.5)",
        "log(a - 0.5)",
        "sqrt(b)",
        "b ^ 0.5",
        "exp(1000)",
        "9e99 * 9e99",
        "10 ^ 99 ^ 99",
        "0^b",
    ],
)
def test_a_formula_without_a_value_says_so_with_the_grades(text: str) -> None:
    with pytest.raises(SampleError, match="calculate_output has no value"):
        value(text)


def test_names_are_the_grades_that_are_used() -> None:
    assert parse_formula("max(a, 0) + long_name", NAMES).names == {"a", "long_name"}


ATOMS = st.one_of(
    st.sampled_from(NAMES), st.integers(0, 9).map(str), st.integers(0, 999).map(lambda n: f"{n / 100}")
)
# Numbers stay far below 1e100 on the way, so that "no value" means the same on both sides.
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+ - * / < <= > >= == !=".split()), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(inner, inner).map(lambda t: f"min(abs({t[0]}), 9) ** min({t[1]}, 3)"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} < {t[1]} <= {t[2]})"),
        st.tuples(st.sampled_from("-+"), inner).map(lambda t: f"{t[0]}{t[1]}"),
        st.tuples(st.sampled_from(["abs", "floor", "ceil", "sqrt", "log"]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        ),
        inner.map(lambda x: f"exp(min({x}, 4))"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=8,
)
PYTHON = {"__builtins__": {}, "min": min, "max": max, "abs": abs} | {
    name: getattr(math, name) for name in ("floor", "ceil", "exp", "sqrt", "log")
}


@given(EXPRESSIONS, st.tuples(*[st.integers(-1000, 1000).map(lambda n: n / 100)] * 3))
@example("(1 < 0 <= log(a))", (-0.01, 0.0, 0.0))  # a chain ends at its first false comparison
def test_safe_expressions_are_worth_what_python_says(text: str, numbers: tuple[float, float, float]) -> None:
    values = dict(zip(NAMES, numbers, strict=True))
    formula = parse_formula(text, NAMES)  # every expression of this grammar is allowed
    try:
        expected = float(eval(text, dict(PYTHON), values))
    except (ArithmeticError, ValueError):
        with pytest.raises(SampleError):
            formula(values)
    else:
        assert formula(values) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.text(alphabet="ab_0123456789.eE+-*/^(),<>=! \n#'lognmix", max_size=80))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        formula = parse_formula(text, NAMES)
    except FormulaError:
        return
    with contextlib.suppress(SampleError):
        assert math.isfinite(formula(VALUES))


@given(st.text(max_size=60))
def test_no_text_at_all_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(FormulaError):
        parse_formula(text, NAMES)
