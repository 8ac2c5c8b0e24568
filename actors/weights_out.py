"""A trainer's weights on their way out: whole, merged, under checkpoint names, layer by layer.

Every rank goes through all layers together, because ZeRO-3 keeps a part of each parameter on each
rank and puts it together by a collective; rank 0 alone packs what comes out. A rank never holds more
than one layer besides its own share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from actors.engine import ZeroEngine
from actors.forward import ForwardPasses
from actors.weight_chunks import ChunkFacts, WeightChunk
from modeseek_ray.objectives.model import ScoringModel, unwrap
from modeseek_ray.types import Sample

# Each chunk costs some milliseconds in Ray, as much as copying tens of MB.
CHUNK_BYTES = 64 * 2**20


def weight_chunks(
    engine: ZeroEngine, module: ScoringModel, *, sends: bool, copied_at_once: bool = False
) -> Iterator[WeightChunk | ChunkFacts]:
    """Chunks of whole layers, and at last the facts about all of them. Ranks that do not send give the facts alone.

    Await the end before the next optimizer step, which changes what is being read. Chunks are views of the
    live weights where those outlive the iteration, that is but for ZeRO-3, which takes a gathered layer back
    as soon as the next is asked for; and there, too, if whoever iterates copies each chunk before that.
    """
    vanishes = engine.zero_stage == 3
    copy = vanishes and not copied_at_once
    checksums, num_bytes, num_weights, seconds = [], 0, 0, 0.0
    started = time.monotonic()
    layers = checkpoint_layers(engine, module)
    for weights in layers if vanishes or not sends else _together(layers):
        if sends:
            chunk = WeightChunk.pack(weights, copy=copy)
            checksums.append(chunk.checksum)
            num_bytes += chunk.num_bytes
            num_weights += len(chunk.names)
            seconds += time.monotonic() - started
            yield chunk
            started = time.monotonic()
    yield ChunkFacts(tuple(checksums), num_bytes, num_weights, seconds + time.monotonic() - started)


def _together(layers: Iterator[list[tuple[str, Tensor]]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbouring layers as one, until they have `CHUNK_BYTES`."""
    found: list[tuple[str, Tensor]] = []
    for weights in layers:
        found += weights
        if sum(tensor.nbytes for _, tensor in found) >= CHUNK_BYTES:
            yield found
            found = []
    if found:
        yield found


def checkpoint_layers(engine: ZeroEngine, module: ScoringModel) -> Iterator[list[tuple[str, Tensor]]]:
    """Names and values as `save_pretrained` of the merged model would write them, layer by layer.

    The tensors may be views of live or gathered weights: copy them before the next layer is asked for.
    """
    layers = CheckpointLayers(engine, module)
    for i in range(len(layers)):
        with layers.whole(i) as weights:
            yield weights


class CheckpointLayers:
    """The same in any order, for whoever lets go of a layer between two calls."""

    def __init__(self, engine: ZeroEngine, module: ScoringModel) -> None:
        self._engine = engine
        self._causal_lm = unwrap(module.model)
        self._layers = _layers(self._causal_lm)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def num_bytes(self) -> list[int]:
        """Of each layer's weights, whole."""
        return [sum(slot.num_bytes for slot in slots) for slots in self._layers]

    @contextmanager
    def whole(self, index: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Names and values of one layer, valid within. All ranks enter and leave together."""
        slots = self._layers[index]
        parts = [p for slot in slots for p in slot.parameters()]
        with self._engine.whole(*parts), torch.no_grad():
            merged = {slot.name: slot.merged() for slot in slots}
            # Experts are one matrix a layer inside the model and one each in a checkpoint. Where nothing was
            # converted, transformers would still compile a pattern for every name.
            converted = getattr(self._causal_lm, "_weight_conversions", None) != []
            yield list((revert_weight_conversion(self._causal_lm, merged) if converted else merged).items())


def token_log_probs(
    passes: ForwardPasses,
    module: ScoringModel,
    sequences: Sequence[NDArray[np.int32]],
    *,
    temperature: float,
) -> list[NDArray[np.float64]]:
    """Log-probability of each token but the first, given those before it, at temperature one, nats.

    `temperature` is the one the module was built for. Without dropout, with the router's own choices.
    Collective: all ranks compute the same.
    """
    samples = [
        Sample(row=i, token_ids_T=token_ids_T, trained_T=np.arange(len(token_ids_T)) > 0)
        for i, token_ids_T in enumerate(sequences)
    ]
    found: list[NDArray[np.float64]] = [np.zeros(0)] * len(samples)
    with _at_temperature_one(module, temperature):
        for forward in passes.infer(samples):
            log_prob_M = forward.scores.log_prob_M.double().cpu().numpy()
            ends = np.cumsum(forward.batch.num_tokens_B.cpu().numpy())[:-1]
            for i, log_prob_T in zip(forward.index_B, np.split(log_prob_M, ends), strict=False):
                found[i] = log_prob_T
    return found


@contextmanager
def _at_temperature_one(module: ScoringModel, temperature: float) -> Iterator[None]:
    scale = module.scale
    module.scale = scale * temperature
    try:
        yield
    finally:
        module.scale = scale


@dataclass
class _Slot:
    """One entry of the checkpoint: a parameter or buffer, and the adapters that change it."""

    name: str
    tensor: Tensor
    adapters: list[Any] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor, wherever its parts are: ZeRO-3 leaves an empty one in their place."""
        return int(getattr(self.tensor, "ds_numel", self.tensor.numel())) * self.tensor.element_size()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that has to be whole before `merged`."""
        if isinstance(self.tensor, nn.Parameter):
            yield self.tensor
        for adapter in self.adapters:
            for name in adapter.adapter_layer_names:
                yield from getattr(adapter, name).parameters()

    def merged(self) -> Tensor:
        """With adapters a new tensor: merging in place and back leaves rounding errors in what is trained."""
        value = self.tensor.detach()
        for adapter in self.adapters:
            for active in adapter.active_adapters:
                value = value + adapter.get_delta_weight(active).to(value.dtype)
        return value


def _layers(causal_lm: nn.Module) -> list[list[_Slot]]:
    """All entries of the checkpoint by layer: what belongs to no numbered layer comes first."""
    adapters: dict[int, list[Any]] = {}
    for module in causal_lm.modules():
        if isinstance(module, LoraLayer):
            is_wrapper = isinstance(module, ParamWrapper)
            adapted = module.get_param() if is_wrapper else module.get_base_layer().weight
            adapters.setdefault(id(adapted), []).append(module)
    kept = set(causal_lm.state_dict().keys())  # not the buffers a checkpoint leaves out
    layers: dict[tuple[str, int], list[_Slot]] = {}
    for name, tensor in [*causal_lm.named_parameters(), *causal_lm.named_buffers()]:
        parts = name.split(".")
        if name not in kept or any(part.startswith("lora_") for part in parts):
            continue
        plain = [part for part in parts if part != "base_layer"]
        slot = _Slot(".".join(plain), tensor, adapters.get(id(tensor), []))
        layers.setdefault(_layer_of(plain), []).append(slot)
    return [layers[key] for key in sorted(layers)]


def _layer_of(parts: Sequence[str]) -> tuple[str, int]:
    """Everything under the first number of a name is one layer: a layer's experts stay together."""
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), int(part)
    return "", -1
