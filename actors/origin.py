"""What a checkpoint was written by: versions of what computes its numbers, and a hash of the configuration.

It lies in the checkpoint's manifest. The same bits follow only from the same of both; so a resumed attempt
says aloud where they differ, and goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modeseek_ray.config import JobConfig

_PACKAGES = ("torch", "deepspeed", "transformers", "modeseek-ray")


def origin_of(config: JobConfig) -> dict[str, Any]:
    """Read from the packages' metadata: the driver loads none of them."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def differences(written_by: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that has changed. Nothing for a checkpoint from before this was kept.

    >>> differences({"versions": {"torch": "2.8.0"}}, {"versions": {"torch": "2.9.0"}})[0][:54]
    'The checkpoint was written with torch 2.8.0, now it is'
    """
    then = written_by.get("versions", {})
    found = [
        f"The checkpoint was written with {name} {then[name]}, now it is {here}: the bits may differ from here on."
        for name, here in now.get("versions", {}).items()
        if name in then and then[name] != here
    ]
    if written_by.get("config_sha256", now.get("config_sha256")) != now.get("config_sha256"):
        found.append(
            "The checkpoint was written under another configuration (or other defaults of it): "
            "what it holds goes on under this one."
        )
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
