"""What exact KL to the start needs, once training has moved on: pi_0's last hidden states and its head.

Kept in host memory: for a fixed set of probe samples [trained tokens, width] and one [vocabulary,
width], instead of a second model. The logits are made again chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from actors.forward import Forward, fingerprint
from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.logprobs import Head
from modeseek_ray.objectives.model import Reference
from modeseek_ray.types import Sample


class Start:
    """pi_0 on the samples it was shown."""

    def __init__(self) -> None:
        self._hidden: dict[bytes, Tensor] = {}  # by fingerprint: [trained tokens, width]
        self._head: Head | None = None

    def remember(self, samples: Sequence[Sample], forwards: Iterable[Forward], head: Head) -> None:
        """Copy `head` and the hidden states of `forwards` (made with `keep_hidden`) to host memory."""
        self._head = _on(head, torch.device("cpu"))
        for forward in forwards:
            hidden_MD = forward.scores.hidden_M
            assert hidden_MD is not None
            for b, i in enumerate(forward.index_B):
                of_sample_M = forward.batch.sample_M == b
                self._hidden[fingerprint(samples[i])] = hidden_MD[of_sample_M].to("cpu", copy=True)

    def reference(self, samples: Sequence[Sample], device: torch.device) -> Reference:
        """What KL of these samples, in this order, is measured against, in both directions."""
        if self._head is None:
            raise ConfigError("KL to the start was asked for, but the start was not remembered.")
        hidden_MD = torch.cat([self._of(sample) for sample in samples])
        return Reference(hidden_MD.to(device), "both", _on(self._head, device))

    def _of(self, sample: Sample) -> Tensor:
        hidden_MD = self._hidden.get(fingerprint(sample))
        if hidden_MD is None:
            raise ConfigError(
                f"KL to the start was asked for on row {sample.row}, which this rank does not remember.",
                mend="Call remember_start with the same groups as evaluate.",
            )
        return hidden_MD


def _on(head: Head, device: torch.device) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    return Head(head.weight_VD.to(device), bias_V, head.scale)
