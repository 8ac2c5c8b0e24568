"""The README is true: its code runs, its tables are the registry's, its plug-in appears everywhere by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import modeseek_ray.weights
from modeseek_ray.weights.catalogue import catalogue, factor_table, preset_table, scheme_table

README = (Path(modeseek_ray.weights.__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)

LOOK_EVERYWHERE = """
import json
import numpy as np
from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.weights import Evidence, Facts, Weighting, check_weighting, needs, weigh
from modeseek_ray.weights.catalogue import scheme_table
from modeseek_ray.weights.registry import SCHEMES

def job(**reward):
    weighted = {"reward": {"scheme": "square_root", **reward}, "guards": {"cap": None}}
    return {"model": "m", "training_file": "f", "method": {"type": "weighted", "weighted": weighted}}

def refused(**reward):
    try:
        parse_config(job(**reward))
    except ConfigError as error:
        return error.param

weighting = parse_config(job(offset=1.0)).weighting
evidence = Evidence(None, None, np.ones(3), rewards_N=np.array([-1.0, 0.0, 3.0]))
section = JobConfig.model_json_schema()["$defs"]["RewardSquareRoot"]
print(json.dumps({
    "registry": "square_root" in SCHEMES["reward"],
    "minimum": section["properties"]["offset"]["minimum"],
    "scope": "scope" in section["properties"],
    "table": scheme_table("reward").count("`square_root` | `g = sqrt(r + offset)` | rewards, with diminishing"),
    "needs": sorted(needs(weighting)),
    "check": [p.param for p in check_weighting(weighting, Facts(has_rewards=False))],
    "refused": [refused(offset=-1.0), refused(ofset=1.0)],
    "values": weigh(evidence, weighting).values_N.tolist(),
}))
"""

# The command and the service as a user has them, without a cluster. Argument: the model's directory.
CHECK_AND_VALIDATE = """
import json
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from typer.testing import CliRunner
from actors.main import app
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.validation import ProcessValidator
from modeseek_ray.service import ServiceSettings, create_app

model, here = Path(sys.argv[1]), Path.cwd()
content = "".join(json.dumps({"prompt": "p", "completion": c, "group": 1, "reward": r}) + "\\n"
                  for r, c in enumerate("abc"))
(here / "rows.jsonl").write_text(content)

def job(file, **reward):
    weighted = {"reward": {"scheme": "square_root", **reward}}
    return {"model": str(model), "training_file": file, "method": {"type": "weighted", "weighted": weighted}}

(here / "job.json").write_text(json.dumps(job("rows.jsonl", offset=1.0)))
checked = CliRunner().invoke(app, ["check", "job.json", "--json", "--home", str(here / "home")])
(here / "bad.json").write_text(json.dumps(job("rows.jsonl", offset=-1.0)))
bad = CliRunner().invoke(app, ["check", "bad.json", "--home", str(here / "home")])

home = Home(here / "home")
home.prepare()
service = create_app(home, Store(home.store_url), validator=ProcessValidator(home),
                     settings=ServiceSettings(roots=(model.parent,)))
with TestClient(service, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
    sent = client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})
    def validate(**reward):
        return client.post("/v1/fine_tuning/jobs/validate", json=job(sent.json()["id"], **reward)).json()
    valid, refused = validate(offset=1.0), validate(offset=-1.0)
print(json.dumps({
    "check": [checked.exit_code, json.loads(checked.output)["data"]["ok"]],
    "check refuses": bad.exception.param,
    "validate": [valid["valid"], valid["error"], valid["report"]["data"]["ok"]],
    "validate refuses": [refused["valid"], refused["error"]["param"]],
    "no cluster": "ray" not in sys.modules,
}))
"""


def run_with_plug_in(
    directory: Path, source: str, entry: str, code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process that finds a package `my_package` with one entry point installed."""
    (directory / "my_package.py").write_text(source)
    info = directory / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[modeseek_ray.weightings]\n{entry}\n")
    root = Path(modeseek_ray.weights.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{root}"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def example() -> tuple[str, str]:
    """The README's package, and its entry point."""
    source = next(text for kind, text in BLOCKS if kind == "python" and "my_package" in text)
    return source, next(text for kind, text in BLOCKS if kind == "toml").splitlines()[1].replace('"', "")


def test_the_example_appears_everywhere_without_another_edit(tmp_path: Path) -> None:
    source, entry = example()
    assert len([line for line in source.splitlines() if line]) <= 15
    seen = json.loads(run_with_plug_in(tmp_path, source, entry, LOOK_EVERYWHERE).stdout)
    # sqrt(r + 1) of (-1, 0, 3) is (0, 1, 2): mean one.
    assert [round(v, 12) for v in seen.pop("values")] == [0.0, 1.0, 2.0]
    assert seen == {
        "registry": True,
        "minimum": 0,
        "scope": True,
        "table": 1,
        "needs": ["rewards"],
        "check": ["method.weighted.reward.scheme"],
        "refused": ["method.weighted.reward.offset", "method.weighted.reward.ofset"],
    }


def test_the_example_appears_in_the_check_command_and_over_http(tmp_path: Path, tiny_dense: Path) -> None:
    seen = json.loads(run_with_plug_in(tmp_path, *example(), CHECK_AND_VALIDATE, str(tiny_dense)).stdout)
    assert seen == {
        "check": [0, True],
        "check refuses": "method.weighted.reward.offset",
        "validate": [True, None, True],
        "validate refuses": [False, "method.weighted.reward.offset"],
        "no cluster": True,
    }


def test_a_broken_plug_in_is_left_out_with_a_warning(tmp_path: Path) -> None:
    code = "from modeseek_ray.weights.registry import SCHEMES; print(sorted(SCHEMES['reward']))"
    done = run_with_plug_in(tmp_path, "import no_such_module", "reward.broken = my_package:broken", code)
    assert "broken" not in done.stdout and "exponential" in done.stdout
    assert "my_package:broken left out: No module named 'no_such_module'" in done.stderr


def test_a_plug_in_cannot_replace_a_scheme(tmp_path: Path) -> None:
    code = "from modeseek_ray.weights.registry import SCHEMES; print(SCHEMES['reward']['linear'].__module__)"
    done = run_with_plug_in(
        tmp_path, "def f(rewards_N): return rewards_N", "reward.linear = my_package:f", code
    )
    assert done.stdout.strip() == "modeseek_ray.weights.reward"
    assert "already a reward scheme" in done.stderr


def test_readme_code_runs() -> None:
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {})


def test_readme_tables_are_the_registry() -> None:
    for table in (scheme_table("likelihood"), scheme_table("reward"), factor_table(), preset_table()):
        assert table in README


def test_every_scheme_says_what_it_is_for() -> None:
    for entry in catalogue():
        assert entry.formula and entry.what and entry.use and entry.avoid, entry.name


def test_weights_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys, numpy as np\n"
        "from modeseek_ray.weights import Evidence, Weighting, weigh\n"
        "x = np.linspace(0, 1, 50)\n"
        "assert 'khat' in weigh(Evidence(x, 0 * x, 1 + 0 * x), Weighting(preset='mode_seeking')).metrics\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'xarray', 'actors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
