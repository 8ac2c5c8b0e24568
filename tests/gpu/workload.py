"""What is measured on: an MoE model with random weights of Qwen3-30B-A3B's layer shape, few layers, and a batch.

N  samples     S  tokens of each     V  vocabulary     D  width     E  experts     K  experts per token
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeseek_ray.types import Sample

# Qwen3-30B-A3B's config.json; it has 48 such layers.
WIDTH = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
# The same code at a size that a laptop's CPU computes in seconds; heads of 32 are vLLM's smallest there.
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@dataclass(frozen=True)
class Case:
    """The work. `trained` of each sample's tokens are trained on, the last ones."""

    device: str
    layers: int
    samples: int
    length: int
    trained: int
    tiny: bool
    repeats: int = 5

    @property
    def num_tokens(self) -> int:
        return self.samples * self.length

    @property
    def num_trained(self) -> int:
        return self.samples * self.trained

    @property
    def shape(self) -> dict[str, int]:
        return TINY if self.tiny else WIDTH

    def config(self) -> Any:
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            **self.shape,
            num_hidden_layers=self.layers,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            max_position_embeddings=max(self.length, 256),
            tie_word_embeddings=False,
            # Routers of trained models have opinions; with 0.02 every choice would be a tie broken by rounding.
            initializer_range=0.05 if not self.tiny else 0.2,
            rope_theta=1_000_000.0,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            router_aux_loss_coef=0.0,
        )

    def save(self, directory: Path) -> Path:
        """A Hugging Face directory of the random model in bfloat16, for engine and trainer alike."""
        from transformers import Qwen3MoeForCausalLM

        torch.manual_seed(0)
        with torch.device(self.device):
            model = Qwen3MoeForCausalLM(self.config()).to(torch.bfloat16)
        model.save_pretrained(directory)
        del model
        if self.device == "cuda":  # other processes want the room
            torch.cuda.empty_cache()
        return directory

    def rows(self) -> list[Sample]:
        rng = np.random.default_rng(0)
        trained_T = np.arange(self.length) >= self.length - self.trained
        return [
            Sample(
                row, rng.integers(5, self.shape["vocab_size"], self.length).astype(np.int32), trained_T.copy()
            )
            for row in range(self.samples)
        ]

    def step_flops(self) -> float:
        """Of one training step: forward, and backward at twice that; recomputation is not counted.

        Per token 2 floating-point operations a parameter it meets (K of E experts), 4 S H d / 2 a layer for
        causal attention; the head for trained tokens alone.
        """
        s = self.shape
        d, heads, kv, head_dim = (
            s["hidden_size"],
            s["num_attention_heads"],
            s["num_key_value_heads"],
            s["head_dim"],
        )
        attention = d * head_dim * (2 * heads + 2 * kv)
        experts = s["num_experts_per_tok"] * 3 * d * s["moe_intermediate_size"] + d * s["num_experts"]
        per_token = self.layers * (2 * (attention + experts) + 2 * self.length * heads * head_dim)
        return 3.0 * (self.num_tokens * per_token + self.num_trained * 2 * d * s["vocab_size"])
