"""Integrations are refused at submission where they could not work."""

from __future__ import annotations

from typing import Any

import pytest

from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.integrations import check_integrations, is_installed


def config(**integration: Any) -> JobConfig:
    job: dict[str, Any] = {"model": "m", "training_file": "f", "method": {"type": "supervised"}}
    return parse_config({**job, "integrations": [integration]})


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_missing_package_is_named(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}' is not installed.*pip install {kind}") as found:
        check_integrations(config(type=kind), installed=lambda package: package != kind)
    assert found.value.param == "integrations.0.type"


@pytest.mark.parametrize(
    ("integration", "param"),
    [
        (
            {"type": "mlflow", "mlflow": {"tracking_uri": "http://10.0.0.1"}},
            "integrations.0.mlflow.tracking_uri",
        ),
        ({"type": "wandb", "wandb": {"base_url": "x"}}, "integrations.0.wandb.base_url"),
        ({"type": "wandb", "wandb": {"project": 3}}, "integrations.0.wandb.project"),
        ({"type": "wandb", "wandb": {"tags": ["a", 1]}}, "integrations.0.wandb.tags"),
        ({"type": "wandb", "mlflow": {}}, "integrations.0.mlflow"),
    ],
)
def test_options_there_are_not_are_refused_by_their_path(integration: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as found:
        check_integrations(config(**integration), installed=lambda _: True)
    assert found.value.param == param


def test_what_works_passes() -> None:
    options = {"project": "p", "name": "n", "entity": "e", "tags": ["a", "b"]}
    check_integrations(config(type="wandb", wandb=options), installed=lambda _: True)
    check_integrations(config(type="mlflow"), installed=lambda _: True)
    assert is_installed("json") and not is_installed("no_such_package")
