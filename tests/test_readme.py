"""What the two README pages tell a reader to type: it exists, by that name, with those options.

What stands in blocks marked `sh run` is run for real (`tests/e2e/test_documents.py`), as all of the user's guide and
the operator's page is. The rest of these two pages starts services, clusters and half-hours of training, so its
commands are held against the command line, the Makefile and the files they name; Docker, Helm and kubectl are not
here, and what they are given is.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml

from actors.main import app
from modeseek_ray.config import parse_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md"]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WITHIN = re.compile(r"\$\(([^()]*)\)")  # `modeseek report $(modeseek list --ids)` is two commands
_INLINE = re.compile(r"`((?:make|modeseek)\s[^`\n]+(?:\n[^`\n]+)?)`")


def blocks(language: str) -> list[str]:
    return [text for page in PAGES for found, text in _FENCE.findall(page.read_text()) if found == language]


def commands(*programs: str) -> Iterator[list[str]]:
    """Words of every command of these programs, in blocks or in running text; `a && b` and `a $(b)` are two."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for language, block in _FENCE.findall(text)
            if language in ("", "sh")
            for line in block.splitlines()
        ]
        for line in [*lines, *_INLINE.findall(_FENCE.sub("", text))]:
            for part in [*_WITHIN.sub("IT", line).split("&&"), *_WITHIN.findall(line)]:
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # a quotation mark of running text
                    continue
                if words and words[0] in programs:
                    yield words


def test_modeseek_has_every_command_and_option_that_is_named() -> None:
    root = typer.main.get_command(app)
    seen = 0
    for words in commands("modeseek"):
        command, rest = root, words[1:]
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert [word for word in rest if word.startswith("--") and word not in known] == [], words
        seen += 1
    assert seen > 15


def test_make_has_every_target_that_is_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands("make")}
    assert {"demo", "test", "faults", "bench"} <= named <= targets


def test_jobs_are_valid_and_python_parses() -> None:
    assert [parse_config(yaml.safe_load(text)).method.type for text in blocks("yaml")] == [
        "supervised",
        "weighted",
        "weighted",
        "online",
    ]
    for text in blocks("python"):
        ast.parse(text)


@pytest.mark.parametrize("program", ["docker", "kubectl", "helm", "cp"])
def test_what_other_programs_are_given_is_there(program: str) -> None:
    """Files and charts named on the line; `deploy/.env` is what `cp` makes."""
    named = {word for words in commands(program) for word in words if word.startswith("deploy/")}
    assert named and [name for name in named - {"deploy/.env"} if not (ROOT / name).exists()] == []


def test_services_that_compose_is_asked_for_are_its_own() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    for words in commands("docker"):
        for flag, following in pairwise(words):
            if flag == "--scale":
                assert following.split("=")[0] in services, words
            if flag == "--rm":
                assert following in services, words


def test_values_that_helm_is_asked_to_set_are_the_charts() -> None:
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "values.yaml").read_text())
    named = [word.split("=")[0] for words in commands("helm") for word in words if "=" in word]
    assert named
    for path in named:
        found = values
        for part in path.split("."):
            assert part in found, path
            found = found[part]
