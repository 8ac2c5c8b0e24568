"""The untrained models: ordinary Qwen3 and Qwen3-MoE of transformers, made small."""

from __future__ import annotations

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from modeseek_ray.playground.recipe import MAX_POSITIONS, Recipe


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """Random weights in float32, the same for the same seed."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_key_value_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel
    if recipe.num_experts == 0:
        model = Qwen3ForCausalLM(Qwen3Config(intermediate_size=recipe.intermediate_size, **shared))
    else:
        config = Qwen3MoeConfig(
            moe_intermediate_size=recipe.intermediate_size,
            intermediate_size=recipe.intermediate_size * recipe.experts_per_token,
            num_experts=recipe.num_experts,
            num_experts_per_tok=recipe.experts_per_token,
            norm_topk_prob=True,
            **shared,
        )
        # Named, so that the weights do not hang on which kernel transformers takes by default.
        config._experts_implementation = "eager"
        model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    return model.float()
