"""The end of a job: a Hugging Face directory, and the proof that it is the model that was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.lora import is_adapted, save_merged
from actors.modeling import load_causal_lm
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
TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 2e-2}  # per token


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


@torch.no_grad()
def verify_export(
    directory: Path,
    samples: Sequence[Sample],
    expected_log_prob_N: FloatArray,
    tolerance: float | None = None,
    *,
    dtype: str = "float32",
    temperature: float = 1.0,
) -> float:
    """Load the export as a stranger would and compare log-probabilities with the trainer's.

    Uses the model's own logits, not our scoring path, so that an error in either shows.
    `expected_log_prob_N` is summed over trained tokens; `tolerance` is in nats per token (None =
    `TOLERANCE_NATS` of the dtype). Returns the largest difference per token; raises `NumericsError`
    naming the row if it is larger than the tolerance or not a number.
    """
    tolerance = TOLERANCE_NATS[dtype] if tolerance is None else tolerance
    model = load_causal_lm(directory, dtype).eval()
    worst, worst_row = 0.0, -1
    for sample, expected in zip(samples, expected_log_prob_N, strict=True):
        if sample.num_tokens == 0:
            continue
        found = _log_prob(model, sample, temperature)
        off = abs(found - float(expected)) / sample.num_tokens
        if not off <= worst:  # also where it is not a number
            worst, worst_row = off, sample.row
        if not off <= tolerance:
            break
    if not worst <= tolerance:
        raise NumericsError(
            f"the exported model's log-probability of row {worst_row} differs from the trainer's"
            f" by {worst:.2e} nats per token (allowed: {tolerance:.0e}).",
            file=str(directory),
            mend="The checkpoint is intact: export it again, and report this.",
        )
    return worst


def _log_prob(model: Any, sample: Sample, temperature: float) -> float:
    """log p of the trained tokens, nats; logits at the positions that predict them only."""
    target_M = np.flatnonzero(sample.trained_T)
    token_ids_T = torch.from_numpy(np.asarray(sample.token_ids_T, dtype=np.int64))
    output = model(
        input_ids=token_ids_T[None], logits_to_keep=torch.from_numpy(target_M - 1), use_cache=False
    )
    log_prob_MV = (output.logits[0].double() / temperature).log_softmax(-1)
    return float(log_prob_MV.gather(1, token_ids_T[target_M, None]).sum())
