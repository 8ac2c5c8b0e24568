"""The end of a job: a Hugging Face directory, and the proof that it is the model that was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.lora import is_adapted, save_merged
from modeseek_ray.errors import NumericsError
from modeseek_ray.types import FloatArray, Sample

# What a model directory holds besides weights and configuration, which are written anew.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
# Most that a reloaded export's log-probabilities may be off, per token.
TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Exported:
    """A model on disk, and how likely some samples were under the weights it was written from."""

    samples: Sequence[Sample]
    log_prob_N: FloatArray  # nats, summed over trained tokens
    sha256: str


def write_export(model: Any, source: Path, directory: Path) -> None:
    """Write `model` (a copy: merging changes it) to `directory`, with the tokenizer of `source`."""
    directory.mkdir(parents=True, exist_ok=True)
    if is_adapted(model):
        save_merged(model, directory)
    else:
        model.save_pretrained(directory)
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
            else:
                shutil.copy2(path, directory / path.name)


def largest_difference(exported: Exported, found_log_prob_N: FloatArray, dtype: str) -> float:
    """How far what somebody finds who loaded the export is from what the trainer found, in nats per token.

    Raises `NumericsError`, naming the row, where that is more than `TOLERANCE_NATS` or not a number.
    """
    num_tokens_N = np.array([max(1, sample.num_tokens) for sample in exported.samples])
    off_N = np.abs(found_log_prob_N - exported.log_prob_N) / num_tokens_N
    worst = int(np.argmax(np.where(np.isnan(off_N), np.inf, off_N)))
    if not off_N[worst] <= TOLERANCE_NATS[dtype]:
        raise NumericsError(
            f"the exported model's log-probabilities differ from the trainer's: row {exported.samples[worst].row}"
            f" by {off_N[worst]:.2e} nats per token (allowed: {TOLERANCE_NATS[dtype]:.0e}).",
            mend="The checkpoint is intact; resume the job to export again, and report this.",
        )
    return float(off_N[worst])
