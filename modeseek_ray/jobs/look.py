"""What a validation with scores is asked to look at: written by the service, read by its validation process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.paths import write_private
from modeseek_ray.weights import PRESETS

ROWS = 2000  # most that are scored unless another number is asked for


@dataclass(frozen=True)
class LookRequest:
    """Which weightings to show beside the job's own, and on how many rows.

    >>> LookRequest.of(["flow", "flow"], rows=0)
    LookRequest(presets=('flow',), rows=0)
    """

    presets: tuple[str, ...] = ()  # none = a choice of ours
    rows: int = ROWS  # 0 = all

    @classmethod
    def of(cls, presets: Sequence[str], rows: int = ROWS, *, param: str = "preset") -> LookRequest:
        """Raises `ConfigError` for a preset there is not; `param` is what the user calls the field."""
        for name in presets:
            if name not in PRESETS:
                raise ConfigError(
                    f"there is no preset {name[:64]!r}.", param=param, mend=f"There are {', '.join(PRESETS)}."
                )
        return cls(tuple(dict.fromkeys(presets)), rows)

    def write(self, path: Path) -> None:
        write_private(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> LookRequest:
        """What `write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(data["presets"]), int(data["rows"]))
