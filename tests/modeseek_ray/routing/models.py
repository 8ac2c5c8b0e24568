"""Every MoE family of transformers as a tiny random model, and what tells them apart."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from modeseek_ray.routing.describe import FIXED, Router, find_routers

VOCABULARY = 64

# Set where a family's configuration has the field.
BASE: dict[str, Any] = {
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
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    # multi-head latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # sparse and linear attention
    "index_n_heads": 6,  # as many as experts: an indexer is no router for that
    "index_head_dim": 8,
    "index_topk": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
}
_GROUPS = {"n_group": 3, "topk_group": 2}

# model_type -> what it needs beyond BASE to be tiny and to show what is special about its routing.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "aria_text": {},
    "axk1": {**_GROUPS, "first_k_dense_replace": 0},
    "axk2": {**_GROUPS, "num_hidden_layers": 3},
    "cohere2_moe": {},
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 32,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "deepseek_v2": {
        **_GROUPS,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    },
    "deepseek_v3": {**_GROUPS, "first_k_dense_replace": 1, "num_hidden_layers": 3},
    "deepseek_v32": {"first_k_dense_replace": 0},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "index_topk": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots1": {},
    "ernie4_5_moe": {"num_hidden_layers": 3},
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"first_k_dense_replace": 0},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "shared_intermediate_size": 8,
        "layer_types": ["mamba", "attention"],
    },
    "granitemoeshared": {"shared_intermediate_size": 8},
    "hunyuan_v1_moe": {"moe_topk": [1, 2], "num_experts_per_tok": [1, 2]},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 8,
    },
    "jamba": {"mamba_d_state": 4, "mamba_expand": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 2,
            "head_dim": 8,
            "short_conv_kernel_size": 2,
        }
    },
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 16},
    "longcat_flash": {"ffn_hidden_size": 16, "expert_ffn_hidden_size": 8, "zero_expert_num": 2},
    "mellum": {},
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 1},  # twice as many in sliding attention
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {"dense_intermediate_size": 16, "shared_intermediate_size": 8, "rotary_dim": 8},
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 8,
        "n_groups": 1,
        "use_mamba_kernels": False,
    },
    "olmoe": {},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {"hc_lowrank": 8},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
REFUSED: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True, "num_experts": 9},
    "phimoe": {},
}


def build(architecture: str, *, seed: int = 0, **more: Any) -> Any:
    """The family's model in evaluation mode; its routers have opinions (weights of size one)."""
    known = AutoConfig.for_model(architecture)
    settings = {name: value for name, value in BASE.items() if _has(known, name)}
    special = FAMILIES.get(architecture, REFUSED.get(architecture, {}))
    config = AutoConfig.for_model(architecture, **{**settings, **special, **more})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        if architecture not in REFUSED:
            for router in find_routers(model):
                sharpen(router.module)
    return model.eval()


def _has(config: Any, name: str) -> bool:
    with contextlib.suppress(Exception):  # Gemma-4 raises for fields that may differ from layer to layer
        return hasattr(config, name)
    return True


def sharpen(router: nn.Module) -> None:
    """Give the projections that score experts weights of size one, wherever the router keeps them."""
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.ndim == 2:
                parameter.normal_()


def tokens(samples: int = 2, positions: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, positions), generator=generator)


def other_routes(routes: np.ndarray, routers: list[Router]) -> np.ndarray:
    """Experts the model did not ask, a legal choice all the same: each moved one on, within its group."""
    other = routes.copy()
    for router in routers:
        own = routes[:, :, router.index, : router.top_k]
        if router.num_groups:  # whole groups move, so that no more of them are used than before
            size = router.num_experts // router.num_groups
            moved = (own + size) % router.num_experts
        else:
            moved = (own + 1) % router.num_experts
        other[:, :, router.index, : router.top_k] = moved
    return other


def features(model: Any) -> str:
    """What is special about a family's routing, read off the model: the last column of the table."""
    routers = find_routers(model)
    found = []
    names = [name for r in routers for name, _ in [*r.layer.named_buffers(), *r.layer.named_parameters()]]
    if any(key in name for name in names for key in ("correction_bias", "expert_bias", "balancing_biases")):
        found.append("correction bias")
    if any(r.num_groups for r in routers):
        found.append("groups of experts")
    if any("shared" in name for r in routers for name, _ in r.layer.named_modules()):
        found.append("shared experts")
    hidden = {r.hidden for r in routers}
    if any(type(module).__name__ in FIXED for module in model.modules()):
        found.append("first layers fixed by token, left alone")
    elif set(range(max(hidden) + 1)) - hidden:
        found.append("layers without experts")
    if len(hidden) < len(routers):
        found.append("two routers a layer")
    if len({r.top_k for r in routers}) > 1:
        found.append("K differs by layer")
    if any(r.num_experts != 6 for r in routers):
        found.append("experts that do nothing")
    if not model.supports_gradient_checkpointing:
        found.append("no gradient checkpointing in transformers")
    return ", ".join(found)
