"""Tiny random MoE models for these tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from modeseek_ray.routing.describe import find_routers

VOCABULARY = 64


def build(architecture: str, *, seed: int = 0, **more: Any) -> Any:
    """A model whose routers have an opinion: random weights of size one in place of zeros or 0.02."""
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
            **more,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        for router in find_routers(model):
            sharpen(router.module)
    return model.eval()


def sharpen(router: nn.Module) -> None:
    """Give the projection that scores experts weights of size one, wherever the router keeps it."""
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.ndim == 2:
                parameter.normal_()


def tokens(samples: int = 2, positions: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, positions), generator=generator)
