"""New weights for a running vLLM, handed over as chunks in memory: a weight-transfer engine of our own.

vLLM's own engines (NCCL, IPC) need CUDA. This one plugs into the same life cycle of theirs: start,
update for each chunk, finish. The chunks lie in memory that is shared with the sender; a layer is
rebuilt as soon as all of its weights were read, so that one layer at most is held twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

if TYPE_CHECKING:
    from torch import nn

    from actors.weight_chunks import WeightChunk

BACKEND = "modeseek_chunks"


def register() -> str:
    """Make vLLM know the engine. Returns its name."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, ChunkTransferEngine.__name__)
    return BACKEND


@dataclass
class ChunkInitInfo(WeightTransferInitInfo):
    """Nothing: no rendezvous."""


@dataclass
class ChunkUpdateInfo(WeightTransferUpdateInfo):
    """One chunk; checked before it comes here."""

    chunk: WeightChunk


class ChunkTransferEngine(WeightTransferEngine[ChunkInitInfo, ChunkUpdateInfo]):
    """Loads checkpoint-named weights from memory that is shared with whoever sent them."""

    init_info_cls = ChunkInitInfo
    update_info_cls = ChunkUpdateInfo

    def init_transfer_engine(self, init_info: ChunkInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        self._chunks: list[WeightChunk] = []
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ChunkUpdateInfo) -> None:
        # Loaded together: each call of `load_weights` walks through all modules of the model several times.
        self._chunks.append(update_info.chunk)

    def finish_weight_update(self) -> None:
        chunks, self._chunks = self._chunks, []
        self.model.load_weights(pair for chunk in chunks for pair in chunk.tensors())
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


def repack(model: nn.Module) -> None:
    """Do over what vLLM does to weights on a CPU after the first load, and leaves out after a reload.

    Without it the model is silently another one:
    * Expert matrices are laid out for the grouped kernel. A reload copies the plain ones into their
      place, and the kernel reads them in the wrong order.
    * An output layer that is tied to the embedding multiplies with a packed copy of its own. A reload
      brings new weights to the embedding; the copy stays that of the old ones.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    module: Any
    for module in model.modules():
        if hasattr(module, "w13_weight"):
            _pack_experts(module)
        elif isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _pack_experts(module: Any) -> None:
    from vllm._custom_ops import cpu_prepack_moe_weight

    experts = module.quant_method.moe_kernel.fused_experts
    if getattr(experts, "_use_zentorch", False):
        return
    for weight in (module.w13_weight, module.w2_weight):
        weight.data.copy_(cpu_prepack_moe_weight(weight.data, experts.isa))
