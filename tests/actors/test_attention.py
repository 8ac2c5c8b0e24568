"""Attention that is strict about the order of its sums in its backward pass, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.attention import make_repeatable


@pytest.fixture
def interfaces() -> Iterator[Any]:
    """transformers' table of attention functions; left as it was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register("sdpa", before)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)


class Watched(torch.autograd.Function):
    """Stands in for a kernel: notes what mode its backward pass runs in."""

    strict: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + 2 * key + 3 * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        Watched.strict.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        return grad, 2 * grad, 3 * grad


def test_only_its_backward_pass_is_strict(interfaces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    def kernel(
        _: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **__: Any
    ) -> tuple[Tensor, None]:
        return Watched.apply(query, key, value), None

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", kernel)
    make_repeatable()
    torch.use_deterministic_algorithms(True, warn_only=True)
    frozen, *inputs = torch.ones(2), *(torch.ones(2, requires_grad=True) for _ in range(2))
    output, _ = interfaces["sdpa"](torch.nn.Module(), frozen, *inputs, None)
    before_M = output * torch.ones(2, requires_grad=True)
    before_M.sum().backward()
    assert Watched.strict == [True]
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "the layers below it are not strict again"
    assert [float(t.grad[0]) for t in inputs] == [2, 3]  # type: ignore[index]


def test_it_changes_no_bit(interfaces: Any, tiny_dense: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = []
    for repeatable in (False, True):
        if repeatable:
            make_repeatable()
        model = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32)
        assert model.config._attn_implementation == "sdpa"
        model(torch.arange(5, 25)[None]).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
