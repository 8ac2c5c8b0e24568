"""What every contender trains: the same model directory, the same samples in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from modeseek_ray.types import Sample

WARM_UP_STEPS = 1
LEARNING_RATE = 1e-4
PROMPT_SHARE = {"prompt-heavy": 0.75, "response-only": 0.0}


@dataclass(frozen=True)
class Case:
    """One row of the table. Sizes are those of a model of 12 M parameters at vocabulary 32,000."""

    vocabulary: int = 32_000
    layout: Literal["prompt-heavy", "response-only"] = "response-only"
    batch_size: int = 8
    length: int = 512
    steps: int = 3  # counted; one more goes before them
    width: int = 256
    layers: int = 4
    threads: int = 2

    @property
    def tokens_per_step(self) -> int:
        """All positions, trained on or not."""
        return self.batch_size * self.length


def build_model(case: Case, directory: Path) -> Path:
    """A random dense Qwen3 with tied embeddings and the tests' byte tokenizer, as a directory."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.conftest import byte_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=case.width // 4,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def make_samples(case: Case) -> list[Sample]:
    """Enough rows for every step, counted or not, of equal length: no contender gains by packing."""
    rng = np.random.default_rng(0)
    first_trained = max(1, round(PROMPT_SHARE[case.layout] * case.length))
    trained_T = np.arange(case.length) >= first_trained
    return [
        Sample(
            row=row,
            token_ids_T=rng.integers(5, case.vocabulary, case.length).astype(np.int32),
            trained_T=trained_T,
        )
        for row in range((WARM_UP_STEPS + case.steps) * case.batch_size)
    ]
