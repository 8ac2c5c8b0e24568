"""The catalogue for people: every scheme with its formula, use and limits, read from its docstring.

`python -m modeseek_ray.weights.catalogue` prints the tables of README.md, with the schemes of installed
plug-ins among them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modeseek_ray.objectives.parameters import TOKEN_FACTORS
from modeseek_ray.weights.presets import PRESETS
from modeseek_ray.weights.registry import SCHEMES, SECTIONS


@dataclass(frozen=True)
class Entry:
    """One scheme: where it goes, what it computes, when to use it and when not."""

    section: str
    name: str
    formula: str
    what: str
    use: str
    avoid: str
    parameters: Mapping[str, Any]  # name -> default


def catalogue() -> list[Entry]:
    """All schemes of both sections, plug-ins included."""
    return [
        _entry(section, name, inspect.getdoc(scheme) or name)
        for section, schemes in SCHEMES.items()
        for name, scheme in schemes.items()
    ]


def _entry(section: str, name: str, docstring: str) -> Entry:
    """The first line is the formula; `What:`, `Use:` and `Not:` start the rest."""
    formula, _, rest = docstring.partition("\n")
    parts = dict(
        re.findall(r"^(What|Use|Not): (.*?)(?=^(?:What|Use|Not): |\Z)", rest, re.DOTALL | re.MULTILINE)
    )
    what, use, avoid = (" ".join(parts.get(key, "").split()) for key in ("What", "Use", "Not"))
    fields = SECTIONS[section][name].model_fields
    parameters = {field: info.default for field, info in fields.items() if field != "scheme"}
    return Entry(section, name, formula.strip(), what, use, avoid, parameters)


def scheme_table(section: str) -> str:
    """Markdown: one row per scheme of a section."""
    rows = [
        f"| `{e.name}` | `{_cell(e.formula)}` | {_cell(e.what)} | {_cell(e.use)} | {_cell(e.avoid)} |"
        for e in catalogue()
        if e.section == section
    ]
    return "\n".join(
        ["| scheme | formula | what it does | use it for | not for |", "|---|---|---|---|---|", *rows]
    )


def factor_table() -> str:
    """Markdown: one row per token factor."""
    rows = [f"| `{name}` | `{_cell(inspect.getdoc(model) or '')}` |" for name, model in TOKEN_FACTORS.items()]
    return "\n".join(["| scheme | factor |", "|---|---|", *rows])


def preset_table() -> str:
    """Markdown: one row per preset."""
    rows = [
        f"| `{name}` | {p.what} | {p.source} | {_cell(p.checked)} | {p.differs} |"
        for name, p in PRESETS.items()
    ]
    head = "| preset | what it is | source | compared with | what differs here |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for heading, table in (
        ("f: likelihood", scheme_table("likelihood")),
        ("g: reward", scheme_table("reward")),
        ("c: token", factor_table()),
        ("presets", preset_table()),
    ):
        print(f"### {heading}\n\n{table}\n")
