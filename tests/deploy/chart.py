"""The Helm chart, rendered without Helm: the few constructs it uses, and an error for any other.

    python -m tests.deploy.chart        # write deploy/kuberay/ anew, after the chart was changed

Helm is a Go program that a test machine need not have. The chart keeps to what is understood here, the
same way Helm does: values, `quote`, `toYaml … | nindent N`, `if … end`, and `{{-` that eats the blanks
before it. `deploy/kuberay/` is the chart with the values below, for those who apply plain files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm"
PLAIN = DEPLOY / "kuberay"
RELEASE = {"Name": "modeseek", "Namespace": "modeseek"}
# What a person has to fill in; nothing works before, and nothing is guessed.
PLACEHOLDERS = {
    "secrets": {
        "create": True,
        "storeUrl": "postgresql://modeseek:CHANGE-ME@postgres.example:5432/modeseek",
        "redisPassword": "CHANGE-ME",
    }
}
HEADER = "# Rendered from deploy/helm by `python -m tests.deploy.chart`; change it there.\n"
_ACTION = re.compile(r"(?P<left>\s*)\{\{(?P<trim>-?)\s*(?P<body>.*?)\s*(?P<after>-?)\}\}")


def values(**changes: Any) -> dict[str, Any]:
    """`values.yaml` with some blocks changed, key by key."""
    return _merge(yaml.safe_load((CHART / "values.yaml").read_text()), changes)


def render(name: str, chosen: dict[str, Any]) -> str:
    """One template. Raises `ValueError` for what only Helm would understand."""
    text = (CHART / "templates" / name).read_text()
    scope = {"Values": chosen, "Release": RELEASE}
    out: list[str] = []
    open_ifs: list[bool] = []
    end = 0
    for action in _ACTION.finditer(text):
        if action["after"]:
            raise ValueError(f"{name}: -}}}} is not understood")
        if all(open_ifs):
            out.append(text[end : action.start()] + ("" if action["trim"] else action["left"]))
        end = action.end()
        body = action["body"]
        if body.startswith("if "):
            open_ifs.append(bool(_value(name, body.removeprefix("if "), scope)))
        elif body == "end":
            open_ifs.pop()
        elif all(open_ifs):
            out.append(_text(name, body, scope))
    if open_ifs:
        raise ValueError(f"{name}: an if without its end")
    return ("".join(out) + text[end:]).lstrip("\n")


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a stream of YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def templates() -> list[str]:
    return sorted(path.name for path in (CHART / "templates").iterdir())


def pods(kubernetes_object: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod specs in an object, wherever its kind keeps them."""
    spec = kubernetes_object.get("spec", {})
    holders = [spec, spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])]
    yield from (holder["template"]["spec"] for holder in holders if "template" in holder)


def plain_objects() -> list[dict[str, Any]]:
    return [found for path in sorted(PLAIN.glob("*.yaml")) for found in documents(path.read_text())]


def _text(name: str, body: str, scope: dict[str, Any]) -> str:
    if match := re.fullmatch(r"toYaml (\S+) \| nindent (\d+)", body):
        dumped = yaml.safe_dump(_value(name, match[1], scope), default_flow_style=False, sort_keys=True)
        return "".join(f"\n{' ' * int(match[2])}{line}" for line in dumped.splitlines())
    path, _, pipe = body.partition(" | ")
    value = _value(name, path, scope)
    if pipe == "quote":
        return json.dumps(str(value), ensure_ascii=False)
    if pipe or isinstance(value, dict | list):
        raise ValueError(f"{name}: {{{{ {body} }}}} is not understood")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(name: str, path: str, scope: dict[str, Any]) -> Any:
    """`.Values.a.b`; a name that is not there is a mistake, not nothing."""
    if not re.fullmatch(r"(\.[A-Za-z]+)+", path):
        raise ValueError(f"{name}: {path!r} is not understood")
    found: Any = scope
    for key in path[1:].split("."):
        if key not in found:
            raise ValueError(f"{name}: {path} is not in values.yaml")
        found = found[key]
    return found


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in changes.items():
        both[key] = _merge(base[key], value) if isinstance(value, dict) else value
    return both


def main() -> None:
    for name in templates():
        (PLAIN / name).write_text(HEADER + render(name, values(**PLACEHOLDERS)))


if __name__ == "__main__":
    main()
