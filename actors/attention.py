"""Attention whose gradients come out in the same bits every time, on a GPU.

torch's fused kernels add up gradients in whatever order their blocks finish, unless
`use_deterministic_algorithms(True, warn_only=False)` holds while their backward pass runs: with `warn_only`
they say so and do it all the same. On an H100, 25 backward passes over the same 2,048 positions gave up to 25
different gradients so, and one with what is here. For a whole model the strict mode raises where an operation
has no other form, so it holds for attention's backward pass alone. cuDNN's kernel is chosen in the forward
pass, where nothing is strict yet, and has no other form: it is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_repeatable() -> None:
    """In this process, transformers' attention over torch's kernels gives repeatable gradients from now on."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        query, key, value = _Last.apply(query, key, value)
        output, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        return _First.apply(output), weights

    torch.backends.cuda.enable_cudnn_sdp(False)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


class _First(torch.autograd.Function):
    """Around attention's output: the first of its backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        torch.use_deterministic_algorithms(True)
        return grad


class _Last(torch.autograd.Function):
    """Around what attention is given: the last of its backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return grads
