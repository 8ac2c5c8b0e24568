"""Low-rank adapters by PEFT: where they go, the model with them off, and what is exported.

The reference of an adapted model is the same model with its adapter off, so no second copy of the
weights is needed. Experts of an MoE model are parameters, not modules, and are adapted as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modeseek_ray.config import Lora
from modeseek_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARAM = "method.weighted.training.lora"


def add_adapters(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Wrap `model` so that only adapters are trained. They start as the identity: B is zero.

    A's random values come from torch's global generator: seed it alike on every rank first.
    Raises `ConfigError` where there is nothing to adapt.
    """
    experts = expert_parameters(model) if lora.target_experts else []
    if lora.target_experts and not experts:
        raise ConfigError(
            f"{type(model).__name__} has no expert matrices to adapt.",
            param=f"{_PARAM}.target_experts",
            mend="Set it to false, or choose an MoE model.",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=attention_projections(model) if lora.target_modules == "auto" else lora.target_modules,
        target_parameters=experts or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        # Adapters in the model's own dtype: DeepSpeed wants one dtype and keeps the float32 master copy.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(
            f"the adapter does not fit {type(model).__name__}: {error}",
            param=f"{_PARAM}.target_modules",
            mend=f'Use "auto", or names among {sorted(_linear_names(model))}.',
        ) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def attention_projections(model: nn.Module) -> list[str]:
    """Last names of the linear layers inside attention blocks. Raises `ConfigError` if there are none."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "att" in name.rpartition(".")[0].rsplit(".", 1)[-1].lower()
    }
    if not names:
        raise ConfigError(
            f"no attention projections were found in {type(model).__name__}.",
            param=f"{_PARAM}.target_modules",
            mend=f"Name the layers to adapt, among {sorted(_linear_names(model))}.",
        )
    return sorted(names)


def expert_parameters(model: nn.Module) -> list[str]:
    """Names, without the layer's number, of the matrices that hold all experts of a layer: [experts, out, in]."""
    names = set()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parameter.dim() == 3 and "experts" in parts:
            last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
            names.add(".".join(parts[last_number + 1 :]))
    return sorted(names)


def is_adapted(model: Any) -> bool:
    """Whether `model` came from `add_adapters`."""
    return isinstance(model, PeftModel)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the one training started from. Raises `ConfigError` for a model without adapters."""
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "only a model with adapters contains its own reference.",
            param="method.weighted.training.lora",
            mend="Score the reference with the scorer pool, or train with LoRA.",
        )
    with model.disable_adapter():
        yield


def save_merged(model: Any, directory: Path) -> None:
    """Write the adapter to `directory/adapter` and the merged model to `directory`.

    `model` is a copy made for this: merging in place and unmerging later would leave rounding errors
    in the weights that are being trained.
    """
    model.save_pretrained(directory / "adapter", safe_serialization=True)
    model.merge_and_unload(safe_merge=True).save_pretrained(directory)


def _linear_names(model: nn.Module) -> set[str]:
    return {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
