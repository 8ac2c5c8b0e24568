"""The chart and the plain files: valid by Kubernetes' and KubeRay's schemas, and at one with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from modeseek_ray import __version__
from tests.deploy.chart import (
    CHART,
    DEPLOY,
    HEADER,
    PLACEHOLDERS,
    PLAIN,
    documents,
    plain_objects,
    pods,
    render,
    templates,
    values,
)

KUBERNETES = "1.34"
GPUS = {"ray": {"gpuWorkers": {"enabled": True}}}
RAYCLUSTER = json.loads((Path(__file__).parent / "raycluster.schema.json").read_text())


def rendered(**changes: Any) -> list[dict[str, Any]]:
    return [found for name in templates() for found in documents(render(name, values(**changes)))]


def test_the_values_fit_the_schema_and_misspelt_ones_do_not() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values(), schema)
    jsonschema.validate(values(**PLACEHOLDERS), schema)
    for wrong in (
        {"images": {}},
        {**values(), "secrets": {"create": True, "storeUrl": "", "redisPassword": ""}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values(), **wrong}, schema)


def test_the_plain_files_are_what_the_chart_renders_to() -> None:
    for name in templates():
        expected = HEADER + render(name, values(**PLACEHOLDERS))
        assert (PLAIN / name).read_text() == expected, f"{name}: run python -m tests.deploy.chart"


def test_the_renderer_refuses_what_it_does_not_understand() -> None:
    chosen = values()
    del chosen["image"]["tag"]
    with pytest.raises(ValueError, match="not in values"):
        render("service.yaml", chosen)


@pytest.mark.parametrize("changes", [{}, PLACEHOLDERS, GPUS], ids=["defaults", "secrets", "gpus"])
def test_every_object_of_the_chart_is_valid(changes: dict[str, Any]) -> None:
    validate(rendered(**changes))


def test_every_plain_object_is_valid() -> None:
    validate(plain_objects())


def validate(objects: list[dict[str, Any]]) -> None:
    """Core kinds by Kubernetes' own schemas, unknown fields refused; RayCluster by KubeRay's, its pods as pods."""
    assert objects
    for found in objects:
        if found["kind"] == "RayCluster":
            jsonschema.validate(found, RAYCLUSTER)
        else:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
        for spec in pods(found):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_pods_are_locked_down() -> None:
    """What the namespace enforces (`restricted`), and a little more."""
    for found in plain_objects():
        for spec in pods(found):
            assert spec["automountServiceAccountToken"] is False
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert "memory" in container["resources"]["limits"]
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                claimed = {volume["name"] for volume in spec.get("volumes", [])}
                assert mounted <= claimed | {"data"}


def test_names_that_objects_call_each_other_by_exist() -> None:
    objects = plain_objects()
    names = {
        kind: {o["metadata"]["name"] for o in objects if o["kind"] == kind}
        for kind in {o["kind"] for o in objects}
    }
    # KubeRay makes these two of a cluster called modeseek-ray.
    names["Secret"].add("modeseek-ray")
    names["Service"].add("modeseek-ray-head-svc")
    names["PersistentVolumeClaim"].add("models")  # the operator's own, said in values.yaml
    text = json.dumps(objects)
    assert set(re.findall(r'"secretKeyRef": {"name": "([^"]+)"', text)) <= names["Secret"]
    assert set(re.findall(r'"claimName": "([^"]+)"', text)) <= names["PersistentVolumeClaim"]
    assert set(re.findall(r'(?:http://|"redisAddress": ")([a-z-]+):\d+', text)) <= names["Service"]
    keys = next(o for o in objects if o["kind"] == "Secret")["stringData"]
    own = re.findall(r'"secretKeyRef": {"name": "modeseek", "key": "([^"]+)"}', text)
    assert set(own) == set(keys)
    deployment = next(o for o in objects if o["kind"] == "Deployment")
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    cluster = next(o for o in objects if o["kind"] == "RayCluster")["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "modeseek-redis:6379"


def test_versions_are_the_pinned_ones() -> None:
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (DEPLOY / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    )
    chart, chosen = yaml.safe_load((CHART / "Chart.yaml").read_text()), values()
    assert chosen["ray"]["version"] == pins["ray"]
    assert chart["version"] == chart["appVersion"] == __version__
    ours = set(re.findall(r"modeseek-ray:([\w.-]+)", "".join(p.read_text() for p in DEPLOY.rglob("*.y*ml"))))
    assert ours == {f"{__version__}-cpu"}
    assert chosen["image"]["tag"] == f"{__version__}-cpu"
