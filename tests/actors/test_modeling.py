"""Loading models: complete or refused, and never two at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from actors.modeling import load_causal_lm
from modeseek_ray.errors import ModelError


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_loads_in_threads_leave_tied_heads_tied(tied: Path) -> None:
    """transformers is patched for the whole process while it loads; overlapping loads would leave it so."""
    tie_weights = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load_causal_lm(tied, "float32"), range(12)))
    assert PreTrainedModel.tie_weights is tie_weights
    assert all(m.lm_head.weight is m.model.embed_tokens.weight for m in models)
    later = AutoModelForCausalLM.from_pretrained(tied)
    assert later.lm_head.weight is later.model.embed_tokens.weight


def test_a_model_with_weights_missing_is_refused(tied: Path) -> None:
    weights = load_file(tied / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of .*model\.norm\.weight"):
        load_causal_lm(tied, "float32")
