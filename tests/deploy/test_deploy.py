"""deploy/: every file against its own checker, offline, and against the program it starts.

Nothing here is applied to a cluster or built into an image: that would need one. What can be known
without: the files parse, fit their schemas, name options, metrics, ports and versions that exist, and the
plain Kubernetes files are what the chart renders to.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import typer.main
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actors.main import app
from modeseek_ray import __version__
from modeseek_ray.config import read_config
from modeseek_ray.jobs.states import TRANSITIONS
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.metrics import Metrics
from modeseek_ray.service.notify import Notifier
from modeseek_ray.weights import needs
from tests.deploy.chart import plain_objects, pods
from tests.deploy.units import problems

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.executable).parent
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def checked(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# Containers


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    checked(TOOLS / "hadolint", path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_pinned_copies_what_exists_and_is_not_roots(path: Path) -> None:
    text = path.read_text()
    bases = re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)
    assert bases and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    assert f"modeseek-ray:{__version__}-{path.stem}" in text
    assert re.findall(r"^USER (\S+)", text, flags=re.MULTILINE)[-1] == "10001:10001"
    allowed = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in text.splitlines() if re.match(r"COPY (?!--from)", line)]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
        assert any(
            name == rule[1:] or name.startswith(f"{rule[1:]}/") for rule in allowed if rule[0] == "!"
        ), name
    lists = set(re.findall(r"deploy/requirements/(\w+)\.txt|RUN deploy/setup\.sh (\w+)", text))
    assert {name for pair in lists for name in pair if name} == {path.stem}


def test_compose_fits_its_schema() -> None:
    checked(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_compose_publishes_on_loopback_alone_and_mounts_what_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["services"]) >= {
        "service",
        "ray-head",
        "ray-worker",
        "postgres",
        "prometheus",
        "grafana",
    }
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.search(r":v?\d+\.\d+", service["image"]), f"{name}: {service['image']} is not pinned"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            elif not source.startswith("$"):
                assert source in compose["volumes"], source
        for other in service.get("depends_on", {}):
            assert "healthcheck" in compose["services"][other], f"{name} waits for {other}'s health"
    wanted = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (DEPLOY / "compose.env.example").read_text(), flags=re.MULTILINE))
    assert wanted == offered


# Programs


def serve_options() -> dict[str, bool]:
    """Options of `modeseek serve` -> whether they may be repeated."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {name: parameter.multiple for parameter in command.params for name in parameter.opts}


def commands() -> Iterator[list[str]]:
    """Every command line of ours in deploy/."""
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        yield list(map(str, service.get("command", [])))
    for found in plain_objects():
        for spec in pods(found):
            yield from (list(map(str, c.get("args", []))) for c in spec["containers"])
    for path in UNITS:
        yield shlex.split(unit(path)["Service"]["ExecStart"].replace("$MODESEEK_OPTIONS", ""))
        told = re.findall(r"MODESEEK_OPTIONS=(--[^\"\n]+)", path.read_text())
        yield from (["modeseek", "serve", *options.split()] for options in told)
    for path in DOCKERFILES:
        yield json.loads(re.findall(r"^CMD (.*)$", path.read_text(), flags=re.MULTILINE)[-1])


def test_options_on_command_lines_exist() -> None:
    from ray.scripts.scripts import start

    ray_options = {name for parameter in start.params for name in parameter.opts}
    known = {"modeseek serve": set(serve_options()), "ray start": ray_options, "modeseek keys": set()}
    seen = set()
    for command in commands():
        program = " ".join([Path(command[0]).name, *command[1:2]]) if command else ""
        if program not in known:
            assert not program.startswith(("modeseek", "ray ")), program
            continue
        seen.add(program)
        used = {word.partition("=")[0] for word in command if word.startswith("--")}
        assert used <= known[program], f"{program}: {used - known[program]}"
    assert seen == set(known)


def unit(path: Path) -> configparser.ConfigParser:
    """A unit file; repeated keys keep the last, which these checks do not mind."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_units_are_complete_and_where_systemd_is_it_agrees(path: Path, tmp_path: Path) -> None:
    assert problems(path.read_text()) == []
    found = unit(path)
    assert set(found.sections()) == {"Unit", "Service", "Install"}
    assert found["Service"]["User"] == "modeseek"
    assert found["Service"]["ExecStart"].startswith("/opt/modeseek/.venv/bin/")
    if shutil.which("systemd-analyze"):
        copy = tmp_path / path.name
        copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/sh", path.read_text(), flags=re.MULTILINE))
        checked("systemd-analyze", "verify", "--man=no", copy)


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("Restart=always", "Restrat=always", "no key 'Restrat'"),
        ("Restart=always", "Restart=forever", "Restart cannot be 'forever'"),
        ("NoNewPrivileges=yes", "NoNewPrivileges=maybe", "cannot be 'maybe'"),
        ("[Install]", "[Instal]", "no section [Instal]"),
        ("ExecStart=/opt", "ExecStart=opt", "ExecStart cannot be"),
        ("ExecStart=", "# ExecStart=", "[Service] lacks ExecStart"),
    ],
)
def test_a_unit_that_systemd_would_not_take_is_found_without_it(good: str, bad: str, said: str) -> None:
    text = (DEPLOY / "systemd" / "modeseek-ray-worker.service").read_text()
    assert good in text
    assert said in "; ".join(problems(text.replace(good, bad)))


# Monitoring


def reported(tmp_path: Path) -> set[str]:
    """Names of all samples that `/metrics` can have."""
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite3'}")
    metrics = Metrics(store, Notifier())
    metrics.request_seconds.labels("GET", "/", "200").observe(0.1)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    store.close()
    return {sample.name for family in families for sample in family.samples}


def expressions() -> Iterator[str]:
    rules = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())
    yield from (rule["expr"] for group in rules["groups"] for rule in group["rules"])
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana" / "dashboard.json").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


def test_every_metric_that_is_asked_for_exists(tmp_path: Path) -> None:
    known = reported(tmp_path)
    asked = {name for expression in expressions() for name in re.findall(r"\bmodeseek_\w+", expression)}
    assert len(asked) >= 6
    assert asked <= known, asked - known
    states = {
        state
        for expression in expressions()
        for names in re.findall(r'state=~?"([^"]+)"', expression)
        for state in names.split("|")
    }
    assert states <= set(TRANSITIONS)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("sum(modeseek_jobs", "unclosed left parenthesis"),
        ("rate(modeseek_jobs)", "expected type matrix"),
        ("sum by (rate(modeseek_jobs[5m])", "unclosed left parenthesis"),
        ("modeseek_jobs[5x]", "duration"),
        ("topk(a)", "argument"),
    ],
)
def test_an_expression_that_prometheus_would_refuse_is_found(broken: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        promql_parser.parse(broken)


def test_rules_and_dashboard_are_well_formed() -> None:
    rules = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+[mh]", rule["for"])
    for expression in expressions():
        promql_parser.parse(expression)  # raises; Prometheus' own grammar, without Prometheus
    panels = json.loads((DEPLOY / "monitoring" / "grafana" / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) == 23
    config = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for target in (
        t for scrape in config["scrape_configs"] for s in scrape["static_configs"] for t in s["targets"]
    ):
        assert target.partition(":")[0] in compose


# Jobs


@pytest.mark.parametrize("path", sorted((DEPLOY / "jobs" / "gpu").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_for_gpus_are_valid_and_fit_the_machines_they_name(path: Path) -> None:
    config = read_config(path)
    assert config.metadata == {"example": path.stem}
    assert "NOT YET RUN" in path.read_text()
    resources = config.resources
    needs_start = "initial" in needs(config.weighting) or config.weighting.kl is not None
    workers = resources.trainers + (resources.scorers if needs_start else 0)
    engines = resources.generators * resources.tensor_parallel if config.method.type == "online" else 0
    gpus = {"dense-7b-lora": 8, "moe-30b-a3b-online": 16}[path.stem]
    assert workers * resources.gpus_per_worker + engines == gpus


# Documents


def test_the_guide_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    named = re.findall(r"`(deploy/[\w./-]+)`", text) + re.findall(
        r" (deploy/[\w./-]+\.(?:ya?ml|Dockerfile))\b", text
    )
    assert named
    missing = [
        name
        for name in named
        if not (ROOT / name).exists() and name not in ("deploy/.env", "deploy/ray-token")
    ]
    assert missing == []
