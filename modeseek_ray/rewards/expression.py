"""The formula of a `multi` grader: `0.8 * right + 0.2 * min(style, 1) - long ^ 2`.

The text is parsed by `ast` and every node is checked against a list; what is left is a tree of float
arithmetic, walked by us. Nothing is ever compiled or evaluated as Python.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from modeseek_ray.rewards.grader import SampleError

MAX_CHARACTERS = 1000
MAX_DEPTH = 100  # of the tree: a sum of n terms is n deep
MAX_MAGNITUDE = 1e100  # of every number on the way, not only of the result

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
# name -> function, fewest and most arguments
_FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 2, 100),
    "max": (max, 2, 100),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}
FUNCTIONS = frozenset(_FUNCTIONS)

_FOREIGN = re.compile(r"[^A-Za-z0-9_.+\-*/^(),<>=!\s]")
# A word, or a number in decimal notation; a number that runs into letters is neither.
_TOKEN = re.compile(r"[A-Za-z_]\w*|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?P<tail>[\w.]*)")


class FormulaError(ValueError):
    """A formula that cannot be read. The message names the position, counted from 1."""


@dataclass(frozen=True)
class Formula:
    """A checked formula over named numbers.

    >>> formula = parse_formula("(right + style) / 2 - (long > 10)", ["right", "style", "long"])
    >>> formula({"right": 1.0, "style": 0.5, "long": 11.0})
    -0.25
    """

    text: str
    tree: ast.expr

    @property
    def names(self) -> frozenset[str]:
        """The numbers it asks for."""
        functions = {id(node.func) for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
        return frozenset(
            node.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and id(node) not in functions
        )

    def __call__(self, values: Mapping[str, float]) -> float:
        """Its value; comparisons are 1 or 0. Raises `SampleError` where it has none (1/0, log 0, overflow)."""
        try:
            return _evaluate(self.tree, values)
        except (ArithmeticError, ValueError) as error:  # math domain error, 1/0, overflow
            shown = ", ".join(f"{name} = {values[name]:g}" for name in sorted(self.names))
            raise SampleError(f"calculate_output has no value ({error}) for {shown}") from None


def parse_formula(text: str, names: Collection[str]) -> Formula:
    """Read a formula over these names. Raises `FormulaError` with the position and what is allowed."""
    if len(text) > MAX_CHARACTERS:
        raise FormulaError(f"a formula has at most {MAX_CHARACTERS} characters, not {len(text)}")
    foreign = _FOREIGN.search(text)
    if foreign:
        raise FormulaError(
            f"position {foreign.start() + 1}: {foreign[0]!r} has no meaning in a formula; there are names, "
            f"numbers, + - * / ^ ** ( ) , < <= > >= == != and {', '.join(sorted(FUNCTIONS))}"
        )
    _check_numbers(text)
    source, position_of = _as_python(text)
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        place = (getattr(error, "offset", None) or len(source) + 1) - 1
        raise FormulaError(
            f"position {position_of(place)}: the formula cannot be read from here on"
        ) from None
    _check(tree, frozenset(names), position_of, depth=0)
    return Formula(text, tree)


def _check_numbers(text: str) -> None:
    """Python has more ways to write numbers (0x1f, 1_000, 2j) than a formula should."""
    for match in _TOKEN.finditer(text):
        if match["number"] is None:
            continue
        if match["tail"]:
            raise FormulaError(f"position {match.start() + 1}: {match[0]!r} is not a decimal number")
        if float(match["number"]) > MAX_MAGNITUDE:
            raise FormulaError(
                f"position {match.start() + 1}: no number may be larger than {MAX_MAGNITUDE:g}"
            )


def _as_python(text: str) -> tuple[str, Callable[[int], int]]:
    """`^` as Python's `**`, on one line; and from an offset in that to a position in `text`, from 1."""
    blank = re.sub(r"\s", " ", text)
    indent = len(blank) - len(blank.lstrip())
    places: list[int] = []  # of each character of the source: where it stands in `text`
    for place, character in enumerate(blank[indent:], start=indent):
        places += [place] * (2 if character == "^" else 1)

    def position_of(offset: int) -> int:
        return (places[offset] if 0 <= offset < len(places) else len(text)) + 1

    return blank.strip().replace("^", "**"), position_of


def _check(node: ast.AST, names: frozenset[str], position_of: Callable[[int], int], depth: int) -> None:
    """Refuse every node that is not on the list. ASCII only, so column offsets count characters."""
    position = position_of(getattr(node, "col_offset", 0))
    if depth > MAX_DEPTH:
        raise FormulaError(f"position {position}: nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return
        case ast.Name(id=name) if name in names:
            return
        case ast.Name(id=name):
            raise FormulaError(
                f"position {position}: {name!r} is not a grader; there are: {', '.join(sorted(names))}"
            )
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            children: list[ast.expr] = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            children = [operand]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _OPERATORS for op in ops):
            children = [left, *others]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            _, fewest, most = _FUNCTIONS[name]
            if not fewest <= len(arguments) <= most:
                wanted = "1 argument" if most == 1 else f"at least {fewest} arguments"
                raise FormulaError(f"position {position}: {name} takes {wanted}, not {len(arguments)}")
            children = arguments
        case ast.Call(func=ast.Name(id=name)):
            raise FormulaError(
                f"position {position}: there is no function {name!r}; there are {', '.join(sorted(FUNCTIONS))}"
            )
        case _:
            raise FormulaError(
                f"position {position}: only numbers, graders, + - * / ^ **, comparisons and "
                f"{', '.join(sorted(FUNCTIONS))} are allowed"
            )
    for child in children:
        _check(child, names, position_of, depth + 1)


def _evaluate(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            value = float(number)
        case ast.Name(id=name):
            value = float(values[name])
        case ast.BinOp(left=left, op=op, right=right):
            value = _OPERATORS[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.UnaryOp(op=op, operand=operand):
            value = _OPERATORS[type(op)](_evaluate(operand, values))
        case ast.Compare(left=left, ops=ops, comparators=others):
            value = 1.0
            low = _evaluate(left, values)
            # As in Python, what follows a false comparison is not looked at.
            for comparison, other in zip(ops, others, strict=True):
                high = _evaluate(other, values)
                if not _OPERATORS[type(comparison)](low, high):
                    value = 0.0
                    break
                low = high
        case ast.Call(func=ast.Name(id=name), args=arguments):
            value = float(_FUNCTIONS[name][0](*(_evaluate(term, values) for term in arguments)))
        case _:
            raise AssertionError("checked when it was parsed")
    if isinstance(value, complex):
        raise ValueError("the root of a negative number")
    if not abs(value) <= MAX_MAGNITUDE:  # NaN compares false
        raise OverflowError(f"a number beyond {MAX_MAGNITUDE:g} on the way")
    return value
