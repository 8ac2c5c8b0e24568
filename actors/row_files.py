"""Checkpoints whose controller remembers a number for every row: an array beside the JSON, not in it.

A million rows are 8 MB this way and read at once; in `controller.json` they were digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actors.checkpoint import CheckpointStore
from modeseek_ray.errors import StorageError, cannot_write
from modeseek_ray.weights.row_values import RowValues

_FILE = "npy_file"  # stands in the JSON where the array was


class RowFileStore(CheckpointStore):
    """Writes `controller.ledger` as `ledger.npy`, and so on; the manifest vouches for them like for the rest."""

    def finish(self, directory: Path, controller: Mapping[str, Any]) -> Path:
        kept = dict(controller.get("controller", {}))
        try:
            for name, values in kept.items():
                if isinstance(values, RowValues):
                    np.save(directory / f"{name}.npy", values.values_R, allow_pickle=False)
                    kept[name] = {_FILE: f"{name}.npy"}
        except OSError as error:
            raise cannot_write("the checkpoint", directory, error, kept="earlier checkpoints are") from error
        return super().finish(directory, {**controller, "controller": kept})

    def read_controller(self, directory: Path) -> dict[str, Any]:
        """As it was handed to `finish`; also what was saved before rows had files, as digits in the JSON."""
        state = super().read_controller(directory)
        kept = state.get("controller", {})
        for name, value in kept.items():
            if isinstance(value, dict) and _FILE in value:
                kept[name] = RowValues(_read(directory / value[_FILE]))
        return state


def _read(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"the checkpoint is damaged: {path.name} cannot be read ({error}).",
            file=str(path.parent),
            mend="Go on from an older one; this one can be removed.",
        ) from error
