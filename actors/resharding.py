"""A ZeRO 1 or 2 checkpoint dealt out to another number of ranks.

Each rank keeps an equal part of one flat vector per parameter group (float32 weights, and AdamW's two
moments alike), the last one padded. Put together without the padding and cut anew, no number changes;
what does change is the order in which ranks' gradients are summed from here on. DeepSpeed's own loader
refuses another number of ranks, and its universal format needs a conversion that unpickles anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    PARAM_ALIGNMENT_PADDINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from modeseek_ray.errors import StorageError

Shard = Mapping[str, Any]


def can_reshard(optimizer: object) -> bool:
    """ZeRO-3 cuts every parameter by itself, and DeepSpeed's optimizer for bfloat16 at stage 1 keeps other vectors."""
    return type(optimizer) is DeepSpeedZeroOptimizer


def shard_files(directory: Path, ranks: int) -> list[Path]:
    """The optimizer's part of each rank that saved. Raises `StorageError`."""
    found = []
    for rank in range(ranks):
        files = list(directory.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        if len(files) != 1:
            raise StorageError(f"the shard of rank {rank} is missing.", file=str(directory))
        found += files
    return found


def reshard(shards: Sequence[Shard], optimizer: DeepSpeedZeroOptimizer, rank: int, world_size: int) -> None:
    """Load the part of `rank` of `world_size` into `optimizer`. Load the module's weights before."""
    weights, states = [], {}
    for group, own in enumerate(optimizer.single_partition_of_fp32_groups):
        parts = [shard[SINGLE_PARTITION_OF_FP32_GROUPS][group] for shard in shards]
        expected = sum(parameter.numel() for parameter in optimizer.bit16_groups[group])
        if sum(part.numel() for part in parts) != expected:
            raise StorageError(
                "the optimizer's shards do not fit together.", mend="Resume with the ranks that saved."
            )
        weights.append(_deal(parts, parts, own.numel(), rank, world_size))
        of_ranks = [shard[BASE_OPTIMIZER_STATE]["state"][group] for shard in shards]
        states[group] = {
            key: _deal([state[key] for state in of_ranks], parts, own.numel(), rank, world_size)
            if torch.is_tensor(value) and value.dim() > 0
            else value
            for key, value in of_ranks[0].items()
        }
    mine = {
        **shards[0],
        BASE_OPTIMIZER_STATE: {**shards[0][BASE_OPTIMIZER_STATE], "state": states},
        SINGLE_PARTITION_OF_FP32_GROUPS: weights,
        GROUP_PADDINGS: optimizer.groups_padding,
        PARAM_ALIGNMENT_PADDINGS: optimizer.round_robin_bit16_padding,
    }
    optimizer.load_state_dict([mine] * world_size, load_optimizer_states=True, load_from_fp32_weights=True)


def _deal(padded: Sequence[Tensor], lean: Sequence[Tensor], size: int, rank: int, world_size: int) -> Tensor:
    """`padded` parts, cut to the lengths of the `lean` ones and joined; the part of `size` numbers for `rank`."""
    whole = torch.cat([part[: one.numel()] for part, one in zip(padded, lean, strict=True)])
    room = torch.zeros(size * world_size, dtype=whole.dtype)
    room[: whole.numel()] = whole
    return room[rank * size : (rank + 1) * size].clone()
