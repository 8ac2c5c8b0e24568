"""Samples into one padded micro-batch, and where in it the predicted tokens are.

B  samples of the micro-batch      S  its longest sequence      M  predicted tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeseek_ray.errors import DataError
from modeseek_ray.types import Sample


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Its M predicted tokens stand sample by sample, in each from left to right.

    >>> sample = Sample(row=0, token_ids_T=np.array([7, 8, 9]), trained_T=np.array([False, False, True]))
    >>> batch = collate([sample], [0], pad_id=0)
    >>> batch.positions_M.tolist(), batch.target_M.tolist(), batch.sample_M.tolist()
    ([1], [9], [0])
    """

    input_ids_BS: Tensor  # int64, padded on the right
    attention_mask_BS: Tensor  # int64: 1 = token, 0 = padding
    positions_M: Tensor  # int64: index into B * S of the position that predicts the target
    target_M: Tensor  # int64
    sample_M: Tensor  # int64: which of the B samples
    num_tokens_B: Tensor  # int64: predicted tokens of each sample
    # float32, nats, under the sampler; NaN for samples that do not say, None where none does
    log_behavior_M: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """Positions that are computed, padding included."""
        return self.input_ids_BS.numel()

    @property
    def num_padded(self) -> int:
        return self.num_positions - int(self.attention_mask_BS.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in vars(self).items()}
        return Batch(**moved)


def collate(
    samples: Sequence[Sample], picks: Sequence[int] | np.ndarray, pad_id: int, *, multiple_of: int = 1
) -> Batch:
    """The samples at `picks`, in that order, padded on the right to the longest, and to a `multiple_of` so many.

    Padding on the right changes nothing under a causal mask; `pad_id` may be any id the embedding has.
    Raises `DataError` if a sample claims to train on its first token, which nothing predicts.
    """
    chosen = [samples[int(i)] for i in picks]
    length = max((s.length for s in chosen), default=0)
    length = -(-length // multiple_of) * multiple_of
    input_ids_BS = np.full((len(chosen), length), pad_id, dtype=np.int64)
    attention_mask_BS = np.zeros((len(chosen), length), dtype=np.int64)
    trained_BS = np.zeros((len(chosen), length), dtype=np.bool_)
    for b, sample in enumerate(chosen):
        if sample.length and sample.trained_T[0]:
            raise DataError(
                f"row {sample.row} trains on its first token, which no token predicts.",
                mend="Start the sequence with a prompt or a beginning-of-sequence token.",
            )
        input_ids_BS[b, : sample.length] = sample.token_ids_T
        attention_mask_BS[b, : sample.length] = 1
        trained_BS[b, : sample.length] = sample.trained_T
    sample_M, column_M = np.nonzero(trained_BS)
    return Batch(
        input_ids_BS=torch.from_numpy(input_ids_BS),
        attention_mask_BS=torch.from_numpy(attention_mask_BS),
        positions_M=torch.from_numpy(sample_M * length + column_M - 1),
        target_M=torch.from_numpy(input_ids_BS[sample_M, column_M]),
        sample_M=torch.from_numpy(sample_M),
        num_tokens_B=torch.from_numpy(trained_BS.sum(1)),
        log_behavior_M=_log_behavior(chosen),
    )


def _log_behavior(samples: Sequence[Sample]) -> Tensor | None:
    """The sampler's log-probabilities of the trained tokens, sample by sample; NaN where a sample has none."""
    if all(s.log_behavior_T is None for s in samples):
        return None
    columns = [
        np.full(s.num_tokens, np.nan, dtype=np.float32)
        if s.log_behavior_T is None
        else np.asarray(s.log_behavior_T, dtype=np.float32)[s.trained_T]
        for s in samples
    ]
    return torch.from_numpy(np.concatenate(columns))
