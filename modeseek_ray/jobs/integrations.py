"""What a job's `integrations` need of this machine, checked at submission rather than hours later.

Where a tracker sends to, and with which key, is the operator's to say, through its own environment
variables (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`): a job must not aim the cluster at a host it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from modeseek_ray.config import JobConfig
from modeseek_ray.errors import ConfigError

# Type of the integration -> options a job may set; each a string, `tags` a list of them.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "wandb": ("project", "name", "entity", "tags"),
    "mlflow": ("experiment_name", "run_name"),
}


def is_installed(package: str) -> bool:
    """Whether Python would find the package, without importing it."""
    return find_spec(package) is not None


def check_integrations(config: JobConfig, installed: Callable[[str], bool] = is_installed) -> None:
    """Raises `ConfigError` naming the package that is missing, or the option there is not."""
    for index, integration in enumerate(config.integrations or []):
        path = f"integrations.{index}"
        if not installed(integration.type):
            raise ConfigError(
                f"the package {integration.type!r} is not installed where the service runs.",
                param=f"{path}.type",
                mend=f"Install it (pip install {integration.type}), or leave the integration out:"
                " metrics are in the events and in metrics.csv anyway.",
            )
        for other in OPTIONS:
            if other != integration.type and getattr(integration, other) is not None:
                raise ConfigError(
                    f"is given, but the type is {integration.type!r}.",
                    param=f"{path}.{other}",
                    mend="Drop it, or change the type.",
                )
        _check_options(integration.type, options_of(integration), path)


def options_of(integration: Any) -> dict[str, Any]:
    """The block of the integration's own type."""
    return dict(getattr(integration, integration.type) or {})


def _check_options(kind: str, options: Mapping[str, Any], path: str) -> None:
    for name, value in options.items():
        if name not in OPTIONS[kind]:
            raise ConfigError(
                "there is no such option.",
                param=f"{path}.{kind}.{name[:64]}",
                mend=f"There are {', '.join(OPTIONS[kind])}; hosts and keys are set in the service's environment.",
            )
        words = value if name == "tags" and isinstance(value, list) else [value]
        if not all(isinstance(word, str) and 0 < len(word) <= 128 for word in words):
            what = "a list of strings" if name == "tags" else "a string"
            raise ConfigError(
                f"must be {what} of 1 to 128 characters.", param=f"{path}.{kind}.{name}", mend="Change it."
            )
