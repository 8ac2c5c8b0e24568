"""Weights from GPU to GPU: vLLM's own NCCL transfer engine, with a ZeRO trainer as its source.

Not yet run: it needs CUDA. vLLM lets the sending process call the engines; here the job's driver
calls both sides (`transfers.NcclTransfer`), so a trainer rank needs no handle on any engine and
the client vLLM asks for does nothing.

Rank 0 of the trainer is rank 0 of the NCCL group; the engines' tensor-parallel workers follow. With
`resources.colocated` a trainer and an engine share a GPU, which NCCL does not take: see `ipc_transfer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from actors.engine import ZeroEngine
from actors.weights_out import checkpoint_layers
from modeseek_ray.objectives.model import ScoringModel


class ZeroSource(WeightSource):
    """The trainer's weights under checkpoint names, gathered layer by layer. All ranks iterate together."""

    def __init__(self, engine: ZeroEngine, module: ScoringModel) -> None:
        self._engine = engine
        self._module = module
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """What iteration yields. The first call is a pass over all weights: merging and splitting decide shapes."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for weights in checkpoint_layers(self._engine, self._module):
            for name, tensor in weights:
                yield name, tensor.clone()  # sent after the layer was let go of


class NcclSender:
    """One trainer rank's part. Every rank makes the same calls; rank 0 sends."""

    def __init__(self, engine: ZeroEngine, module: ScoringModel, rank: int) -> None:
        self._source = ZeroSource(engine, module)
        self._rank = rank
        self._sender: Any = None

    def join(self, address: str, port: int, world_size: int) -> None:
        """Meet the engines, which are told to join at the same time."""
        self._sender = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=world_size, rank=self._rank, packed=True
            ),
            client=_Driven(),
            source=self._source,
        )

    def describe(self) -> dict[str, list[Any]]:
        """What engines have to be told before the bytes come: names, dtypes, shapes, in order."""
        metadata = self._source.metadata()
        return {
            "names": [m.name for m in metadata],
            "dtype_names": [str(m.dtype).removeprefix("torch.") for m in metadata],
            "shapes": [list(m.shape) for m in metadata],
        }

    def send(self) -> None:
        """Broadcast all weights; returns when they have left. The engines receive at the same time."""
        self._sender.send_weights()


class _Driven:
    """The engines' side is called by the driver, at the moments vLLM would call it here."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
