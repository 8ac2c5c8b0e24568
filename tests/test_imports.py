"""Who may import whom. The order is a table; the imports are read from the sources, so that an
import inside a function or under TYPE_CHECKING counts as well.

    errors, types, strict
      <- weights, rewards, objectives.parameters,                  pure functions and their parameters
         routing.wire, routing.compare
      <- methods, config                                           all a user may ask for
      <- data, jobs, retention, reports, client                    one concern each
      <- service                                                   puts them behind HTTP
    playground stands on config and data; the torch halves of objectives and routing serve actors
    alone; actors may import all of the library, and the library never imports actors.
"""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What everybody may import: the words all parts share. They import only each other.
SHARED = {"errors", "types", "strict", "mends"}

FOUNDATION = {"weights", "rewards", "objectives.parameters", "routing.wire", "routing.compare"}
CONCERNS = {"data", "jobs", "retention", "reports", "client"}

# Unit -> the units it may import besides itself and SHARED. Parts on one level do not know each
# other; each exception says why. A unit that is missing here fails the test: decide its place.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "strict": set(),
    "mends": set(),  # of what `strict` refuses
    "rewards": set(),
    "objectives.parameters": set(),
    "routing.wire": set(),
    "routing.compare": {"routing.wire"},
    "weights": {"objectives.parameters"},  # a weighting names its token factor and KL, with their parameters
    "methods": FOUNDATION,
    "config": FOUNDATION | {"methods"},
    "data": FOUNDATION | {"config"},
    # The plan of a job counts its rows and tokens; model names include the playground's.
    "jobs": FOUNDATION | {"config", "data", "playground"},
    "retention": FOUNDATION | {"config"},
    "reports": FOUNDATION | {"config", "retention"},  # the report shows the retention table
    "client": FOUNDATION | {"config"},
    "service": FOUNDATION | CONCERNS | {"config"},
    "playground": FOUNDATION | {"config", "data"},
    "objectives": {"objectives.parameters", "routing.wire", "routing"},
    "routing": {"routing.wire", "routing.compare"},
}

ENGINES = {"ray", "vllm", "deepspeed"}
TORCH = {"torch", "transformers", "accelerate", "peft"}

# Parts of the library in which torch is at home. Everywhere else the API must start without it.
TORCH_UNITS = {"objectives", "routing", "playground"}
# Ray at the edge: everything else is a plain class that a test or a debugger can build.
RAY_FILES = {
    "actors/cluster.py": "placement groups and ray.remote",
    "actors/scoring.py": "Ray Data streams a data set through the scorers",
    "actors/ray_jobs.py": "the Ray Jobs client behind the Launcher protocol",
}

LIGHT_MODULES = ("service", "config", "weights", "data", "client", "jobs", "reports", "retention")
HEAVY = sorted(ENGINES | TORCH | {"datasets", "trl"})


@dataclass(frozen=True)
class Import:
    file: str  # relative to the root, with forward slashes
    line: int
    name: str  # dotted, as far as it names a module


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import statement of a file, at any depth; `from a import b` names a.b where that is a module."""
    file = path.relative_to(root).as_posix()
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield Import(file, node.lineno, full if is_module(full, root) else source)


def unit_of(name: str) -> str | None:
    """The row of the table a library module belongs to; the package itself is nobody's."""
    parts = name.split(".")[1:]
    pair = ".".join(parts[:2])
    return pair if pair in MAY_IMPORT else parts[0] if parts else None


def breaches(root: Path) -> list[str]:
    """Every import below `root` that goes the wrong way, with file and line and the rule it breaks."""
    found = []
    for package in ("modeseek_ray", "actors"):
        for path in sorted((root / package).rglob("*.py")):
            for item in imports_of(path, root):
                rule = broken_rule(item, module_name(path, root))
                if rule:
                    found.append(f"{item.file}:{item.line} imports {item.name}: {rule}")
    return found


def broken_rule(item: Import, importer: str) -> str | None:
    top = item.name.split(".")[0]
    if top == "ray" and importer.startswith("actors") and item.file not in RAY_FILES:
        return f"only {', '.join(RAY_FILES)} know Ray"
    if importer.startswith("actors"):
        return None
    if top == "actors":
        return "the library never imports actors"
    if top in ENGINES:
        return "the library imports no engine (ray, vllm, deepspeed)"
    unit = unit_of(importer)
    if top in TORCH and unit not in TORCH_UNITS:
        return f"torch is at home in {', '.join(sorted(TORCH_UNITS))} and in actors only"
    if top != "modeseek_ray" or unit is None:
        return None
    if unit not in MAY_IMPORT:
        return f"{unit} has no place in the order yet; give it a row in MAY_IMPORT"
    target = unit_of(item.name)
    if target is None or target == unit or target in SHARED | MAY_IMPORT[unit]:
        return None
    return f"{unit} may import {', '.join(sorted(SHARED | MAY_IMPORT[unit] - {unit}))}, not {target}"


def test_imports_go_one_way_only() -> None:
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("modeseek_ray/data/reader.py", "import actors.driver", "never imports actors"),
        ("modeseek_ray/jobs/store.py", "def f():\n    import ray", "no engine"),
        ("modeseek_ray/config.py", "from torch import Tensor", "torch is at home"),
        ("modeseek_ray/objectives/parameters.py", "import torch", "torch is at home"),
        ("modeseek_ray/routing/wire.py", "import torch", "torch is at home"),
        ("modeseek_ray/routing/compare.py", "import modeseek_ray.objectives.loss", "not objectives"),
        ("modeseek_ray/config.py", "from modeseek_ray.routing.hooks import f", "not routing"),
        ("modeseek_ray/weights/gamma.py", "from modeseek_ray.config import JobConfig", "not config"),
        ("modeseek_ray/weights/gamma.py", "from ..config import JobConfig", "not config"),
        ("modeseek_ray/weights/gamma.py", "from modeseek_ray import rewards", "not rewards"),
        ("modeseek_ray/data/reader.py", "from modeseek_ray.objectives.logprobs import f", "not objectives"),
        ("modeseek_ray/novelty/new.py", "import modeseek_ray.errors", "no place in the order"),
        ("actors/trainer.py", "from ray.util import placement_group", "know Ray"),
    ],
)
def test_a_breach_is_caught(tmp_path: Path, file: str, source: str, rule: str) -> None:
    for name in (
        "errors",
        "config",
        "rewards/__init__",
        "objectives/logprobs",
        Path(file).with_suffix("").name,
    ):
        target = tmp_path / "modeseek_ray" / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)

    [breach] = breaches(tmp_path)

    assert breach.startswith(f"{file}:{source.count(chr(10)) + 1} imports ")
    assert rule in breach


def test_what_is_allowed_is_not_called_a_breach(tmp_path: Path) -> None:
    files = {
        "modeseek_ray/weights/weighting.py": "from modeseek_ray.objectives.parameters import Token",
        "modeseek_ray/objectives/parameters.py": "from modeseek_ray.strict import Strict",
        "modeseek_ray/objectives/loss.py": "import torch\nfrom .parameters import Token",
        "actors/cluster.py": "import ray\nfrom modeseek_ray.service import app",
    }
    for file, source in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    assert breaches(tmp_path) == []


def loaded_by(statement: str, among: list[str]) -> list[str]:
    """Which of these packages a fresh interpreter has loaded after the statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([m for m in {among!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_the_api_side_loads_no_engine() -> None:
    modules = ", ".join(f"modeseek_ray.{name}" for name in LIGHT_MODULES)
    assert loaded_by(f"import {modules}", HEAVY) == []


def test_the_numpy_half_of_routing_loads_no_engine() -> None:
    """Nor does the package itself, which offers names of the torch half: they load it when asked for."""
    modules = "modeseek_ray.routing, modeseek_ray.routing.wire, modeseek_ray.routing.compare"
    assert loaded_by(f"import {modules}", HEAVY) == []
    assert loaded_by("from modeseek_ray.routing import record_routes", HEAVY) == ["torch"]


def test_the_loop_of_a_job_loads_no_engine() -> None:
    assert loaded_by("import actors.driver", HEAVY) == []


def test_looking_at_loaded_modules_can_fail() -> None:
    assert loaded_by("import numpy, yaml", ["numpy", "torch", "yaml"]) == ["numpy", "yaml"]


def test_the_service_answers_without_an_engine(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """A real start. Python itself writes down every module it loads (-X importtime)."""
    port = free_port()
    command = ["-m", "modeseek_ray.service", "--home", str(tmp_path / "home"), "--port", str(port)]
    trace = tmp_path / "stderr"
    with trace.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-X", "importtime", *command], cwd=ROOT, stderr=stderr)
    try:
        assert answer(f"http://127.0.0.1:{port}/healthz", process, deadline_s=60) == 200
        assert answer(f"http://127.0.0.1:{port}/v1/fine_tuning/jobs", process, deadline_s=60) == 200
        assert answer(f"http://127.0.0.1:{port}/v1/models", process, deadline_s=60) == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)

    loaded = {line.rsplit("|", 1)[-1].strip() for line in trace.read_text().splitlines() if "|" in line}
    assert {"numpy", "fastapi", "modeseek_ray.service"} <= loaded
    assert loaded & set(HEAVY) == set()


def answer(url: str, process: subprocess.Popen[bytes], *, deadline_s: float) -> int:
    """The status of a GET, asked again until somebody listens."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                status: int = response.status
                return status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"nobody answered at {url}; the service's exit code is {process.poll()}")
