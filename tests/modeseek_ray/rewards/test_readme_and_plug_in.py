"""The README is true: its code runs, its jobs validate, its tables are complete, its plug-in is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

import modeseek_ray.rewards
from modeseek_ray.rewards import GraderSection, read_endpoints, similarity
from modeseek_ray.rewards.parameters import SECTIONS
from modeseek_ray.rewards.similarity import METRICS

README = (Path(modeseek_ray.rewards.__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)

USE = """
import asyncio, json
from pydantic import TypeAdapter, ValidationError
from modeseek_ray.rewards import GradeItem, GraderSection, build_grader

section = TypeAdapter(GraderSection)

def grade(written, *items):
    found = asyncio.run(build_grader(section.validate_python(written)).grade(items))
    return [[g.reward, g.error] for g in found]

def refused(written):
    try:
        section.validate_python(written)
    except ValidationError as error:
        return error.errors()[0]["msg"]

items = [GradeItem("one two three", item, 3) for item in ({}, {"most_words": 3}, {"most_words": "x"})]
alone = {"type": "few_words", "most": 2}
multi = {"type": "multi", "graders": {"w": alone}, "calculate_output": "1 - w"}
print(json.dumps({
    "alone": grade(alone, *items),
    "multi": grade(multi, *items[:2]),
    "refused": [refused({**alone, "most": 0}), refused({"type": "no_words"})],
    "schema": section.json_schema()["$defs"]["GraderFewWords"]["properties"]["most"]["minimum"],
}))
"""


def run_with_plug_in(directory: Path, source: str, entry: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process that finds a package `my_package` with one entry point installed."""
    (directory / "my_package.py").write_text(source)
    info = directory / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[modeseek_ray.graders]\n{entry}\n")
    root = Path(modeseek_ray.rewards.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{root}"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )


def test_the_example_works_without_another_edit(tmp_path: Path) -> None:
    source = next(text for kind, text in BLOCKS if kind == "python" and "my_package" in text)
    entry = next(text for kind, text in BLOCKS if kind == "toml").splitlines()[1].replace('"', "")
    assert len([line for line in source.splitlines() if line]) <= 15
    seen: dict[str, Any] = json.loads(run_with_plug_in(tmp_path, source, entry, USE).stdout)
    assert seen["alone"] == [[0.0, None], [1.0, None], [None, "most_words is 'x', not a whole number"]]
    assert seen["multi"] == [[1.0, None], [0.0, None]]
    assert "greater than or equal to 1" in seen["refused"][0]
    assert seen["refused"][1].endswith("length_penalty, few_words, multi")
    assert seen["schema"] == 1


def test_what_cannot_be_a_plug_in_is_left_out_with_a_warning(tmp_path: Path) -> None:
    code = "from modeseek_ray.rewards.parameters import SECTIONS; print(sorted(SECTIONS))"
    cases = {
        "broken = my_package:f": ("import no_such_module", "No module named 'no_such_module'"),
        "string_check = my_package:f": ("def f(text): return 1", "there is already a grader 'string_check'"),
        "python = my_package:f": ("def f(text): return 1", "there is already a grader 'python'"),
        "odd-name = my_package:f": ("def f(text): return 1", "must be an identifier, not 'odd-name'"),
        "asks = my_package:f": ("def f(prompt): return 1", "it asks for prompt; there are item, num_tokens"),
        "untyped = my_package:f": ("def f(text, *, x=1): return 1", "'x' needs a type and a default"),
    }
    for n, (entry, (source, said)) in enumerate(cases.items()):
        directory = tmp_path / str(n)
        directory.mkdir()
        done = run_with_plug_in(directory, source, entry, code)
        assert "grader plug-in my_package:f left out: " in done.stderr
        assert said in done.stderr
        assert done.stdout == f"{sorted(SECTIONS)}\n"


def test_the_readme_s_code_and_jobs_are_valid(tmp_path: Path) -> None:
    for kind, text in BLOCKS:
        if kind == "python" and "my_package" not in text:
            exec(compile(text, "README.md", "exec"), {})
    jobs = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    [multi] = [job["grader"] for job in jobs if job.get("grader", {}).get("type") == "multi"]
    TypeAdapter(GraderSection).validate_python(multi)
    path = tmp_path / "endpoints.yaml"
    path.write_text(next(text for kind, text in BLOCKS if kind == "yaml" and text.startswith("endpoints:")))
    assert [endpoint.models for endpoint in read_endpoints(path)] == [["judge-large"]]


def test_the_readme_s_tables_are_complete() -> None:
    types = re.findall(r"^\| `(\w+)` \|.*\|$", README.split("**Templates.**")[0], re.MULTILINE)
    assert set(types) - {"type"} == set(SECTIONS)
    table = re.findall(r"^\| `\w.*\|$", similarity.__doc__ or "", re.MULTILINE)
    assert len(table) == len(METRICS) - 4  # rouge_1 to rouge_5 share a row
    assert all(row in README for row in table)


def test_graders_load_no_library_before_they_grade() -> None:
    code = (
        "import sys\n"
        "import modeseek_ray.rewards\n"
        "heavy = 'torch ray transformers nltk sacrebleu rouge_score rapidfuzz math_verify sympy httpx regex'\n"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
