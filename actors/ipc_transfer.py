"""Weights to an engine on the same GPU: a trainer rank lends memory that vLLM's IPC engine reads. Not yet run.

It needs CUDA, and an engine beside a trainer (`resources.colocated`). vLLM's own sender calls the engines itself,
between lending and freeing; here the job's driver calls both sides (`transfers.IpcTransfer`), so lending is a call
of its own for each layer, and taking back is another. What is sent is what vLLM's packed receiver reads: one
buffer, exported once a hand-over, from which it copies each tensor before it answers.

A process that exports memory which nobody opens never gets it back, so only ranks beside an engine lend.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from actors.cards import card
from actors.engine import ZeroEngine
from actors.weights_out import CheckpointLayers
from modeseek_ray.objectives.model import ScoringModel


class IpcLender:
    """One trainer rank's part. Every rank makes the same calls, because ZeRO-3 gathers a layer from all of them."""

    def __init__(self, engine: ZeroEngine, module: ScoringModel) -> None:
        self._layers = CheckpointLayers(engine, module)
        self._device = engine.device
        self._buffer: torch.Tensor | None = None
        self._handle: tuple[Any, ...] = ()

    def lend(self, layer: int, cards: Collection[str]) -> dict[str, Any] | None:
        """vLLM's update for one layer (`IPCWeightTransferUpdateInfo`); None behind the last.

        `cards` are those of the engines; a rank on another one only helps to gather. The engines have to have
        answered before the next layer is lent: it goes into the same memory.
        """
        if layer == len(self._layers):
            return None
        own = card()
        lends = own in cards
        if lends and self._buffer is None:
            self._buffer = torch.empty(max(self._layers.num_bytes), dtype=torch.uint8, device=self._device)
            self._handle = reduce_tensor(self._buffer)[1]
        with self._layers.whole(layer) as weights:
            # Wide dtypes first: then each tensor begins where its dtype may be read.
            weights.sort(key=lambda pair: -pair[1].element_size())
            sizes = [tensor.numel() * tensor.element_size() for _, tensor in weights]
            if lends:
                self._pack([tensor for _, tensor in weights], sizes)
            return {
                "names": [name for name, _ in weights],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in weights],
                "shapes": [list(tensor.shape) for _, tensor in weights],
                "tensor_sizes": sizes,
                "ipc_handles": {own: self._handle} if lends else {},
            }

    def take_back(self) -> None:
        """Free the memory. Await after the engines have finished with it."""
        self._buffer, self._handle = None, ()
        torch.cuda.ipc_collect()

    def _pack(self, tensors: list[torch.Tensor], sizes: list[int]) -> None:
        assert self._buffer is not None
        parts = self._buffer[: sum(sizes)].split(sizes)
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        torch.cuda.current_stream().synchronize()  # another process reads it next
