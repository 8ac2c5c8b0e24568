"""How far the parameters have moved from the start: the norm of theta - theta_0 over the whole model.

Of the weights the model computes with (and is exported with): in bfloat16 these, not the float32 master
copy. theta_0 is kept in a file, an equal share of every parameter on each rank. With LoRA nothing
is kept: theta_0 is the model with its adapters off, and the distance is that of the merged weights, the
norm of alpha/r B A, so that it compares with a full fine-tuning's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from actors.engine import ZeroEngine
from actors.lora import is_adapted
from actors.shelf import Shelf


class StartWeights:
    """One rank's share of theta_0. Every method is collective."""

    def __init__(self, engine: ZeroEngine, model: nn.Module, rank: int, world_size: int) -> None:
        """Before the first step and before any checkpoint is loaded."""
        self._engine = engine
        self._model = model
        self._rank, self._world_size = rank, world_size
        self._adapters = [m for m in model.modules() if isinstance(m, LoraLayer)] if is_adapted(model) else []
        self._share = Shelf()
        if not self._adapters:
            for name, tensor in self._parameters():
                self._share.put(name, self._own(tensor))

    @torch.no_grad()
    def distance(self) -> float:
        """The Euclidean norm of theta - theta_0 over all trained parameters, the same on every rank."""
        if self._adapters:
            return math.sqrt(sum(self._adapter_square(adapter) for adapter in self._adapters))
        own = 0.0
        for name, tensor in self._parameters():
            start = self._share.get(name).to(tensor.device)
            own += _square(self._own(tensor).float() - start.float())
        return math.sqrt(sum(self._engine.collect(own)))

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self._engine.parameters(self._model, trainable_only=True)

    def _own(self, tensor: Tensor) -> Tensor:
        """This rank's share of a whole parameter, flat."""
        size = -(-tensor.numel() // self._world_size)
        return tensor.reshape(-1)[self._rank * size : (self._rank + 1) * size]

    def _adapter_square(self, adapter: LoraLayer) -> float:
        """Of one adapted matrix, or of one layer's experts."""
        parameters = [p for name in adapter.adapter_layer_names for p in getattr(adapter, name).parameters()]
        with self._engine.whole(*parameters):
            return sum(_square(adapter.get_delta_weight(active)) for active in adapter.active_adapters)


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64) ** 2)
