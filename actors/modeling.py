"""The model a rank trains: loaded, adapted, wrapped for scoring. Plain PyTorch, no DeepSpeed."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.lora import add_adapters
from modeseek_ray.config import Training
from modeseek_ray.errors import ModelError
from modeseek_ray.objectives.model import ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# While it loads, transformers swaps `PreTrainedModel.tie_weights` for a function that does nothing, for
# the whole process. Two loads that overlap can put the empty one back for good: every tied head loaded
# later is random, without an error.
_LOADING = threading.Lock()


def load_causal_lm(path: str | Path, dtype: str) -> PreTrainedModel:
    """A causal language model from a directory, on the CPU, safetensors only, none of its code run.

    Raises `ModelError` if it cannot be loaded, or if the files lack weights of the architecture, which
    transformers would fill in at random.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, "causal language model", path, dtype)


def load_sequence_classifier(path: str | Path, dtype: str) -> PreTrainedModel:
    """A sequence classifier (a reward model), under the same conditions and with the same errors.

    A language model is none: it lacks the head, and a random one would grade at random.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, "sequence classifier", path, dtype)


def _load(auto_class: Any, kind: str, path: str | Path, dtype: str) -> PreTrainedModel:
    try:
        with _LOADING:
            model, loaded = auto_class.from_pretrained(
                path,
                output_loading_info=True,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot be loaded as a {kind}: {error}",
            file=str(path),
            mend="Give a Hugging Face directory with config.json and safetensors of a supported architecture.",
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"its files lack {len(missing)} of the architecture's weights, {missing[0]} for one.",
            file=str(path),
            mend="Save the model again with `save_pretrained`, or give the directory of a complete one.",
        )
    return model


def build_trainable(path: str | Path, dtype: str, training: Training) -> Any:
    """The model with adapters where the job has them. Adapters are drawn from torch's global generator."""
    model = load_causal_lm(path, dtype)
    return model if training.lora is None else add_adapters(model, training.lora)


def prepare_for_training(model: Any, *, temperature: float, gradient_checkpointing: bool) -> ScoringModel:
    """Wrap `model`, changing it in place.

    The routers' auxiliary losses of MoE models are off: the loss is the objective and nothing else.
    Recomputation is the non-reentrant kind, which works with frozen embeddings and partitioned weights.
    """
    config = model.config
    for name, value in {"output_router_logits": False, "router_aux_loss_coef": 0.0}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return ScoringModel(model, temperature=temperature)


def frozen_copy(module: ScoringModel) -> ScoringModel:
    """A second set of weights that stays as it is now."""
    frozen = copy.deepcopy(module)
    frozen.requires_grad_(False)
    return frozen.eval()


def is_stochastic(module: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers (dropout, router jitter)."""
    config = getattr(module, "config", None)
    names = ("attention_dropout", "attn_pdrop", "attn_dropout", "router_jitter_noise")
    if any(getattr(config, name, None) for name in names):
        return True
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())
