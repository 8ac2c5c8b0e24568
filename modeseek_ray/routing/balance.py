"""The load-balancing loss of MoE models, by the function transformers itself has for a family.

    N  positions of a micro-batch     E  experts     K  experts per token     L  routers

loss = E * sum_e f_e P_e  (Switch Transformer, 2101.03961, equations 4 to 6): f_e is how often expert e is
among the K of a token, P_e its mean softmax probability, both pooled over all layers and over the tokens
that are not padding. Even routing gives K, the least; f carries no gradient. f is of the *live* logits,
whatever routes are replayed.

As in transformers the loss is one micro-batch's: f is not gathered over ranks or accumulation steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modeseek_ray.errors import ModelError
from modeseek_ray.routing.describe import find_routers

_FUNCTION = "load_balancing_loss_func"


@dataclass(frozen=True)
class LoadBalancing:
    """Where a model's gate logits come out, and what becomes of them."""

    gates: list[nn.Module]  # in the order of layers
    index: int  # of the logits in what a gate returns
    num_experts: int
    top_k: int
    function: Callable[..., Any]

    @classmethod
    def of(cls, model: nn.Module, causal_lm: nn.Module) -> LoadBalancing:
        """`causal_lm` is the transformers model inside `model`. Raises `ModelError` where it has no such loss."""
        routers = find_routers(model)
        if not routers:
            raise _refused(causal_lm, "has no experts to balance")
        function = next(
            (
                getattr(sys.modules[owner.__module__], _FUNCTION)
                for owner in type(causal_lm).__mro__
                if hasattr(sys.modules[owner.__module__], _FUNCTION)
            ),
            None,
        )
        recorders = getattr(causal_lm.base_model, "_can_record_outputs", None) or {}
        recorder = recorders.get("router_logits")
        sizes = {(router.num_experts, router.top_k) for router in routers}
        if function is None or not hasattr(recorder, "target_class") or len(sizes) > 1:
            raise _refused(causal_lm, "has no load-balancing loss in transformers")
        gates = [
            module
            for name, module in model.named_modules()
            if isinstance(module, recorder.target_class)  # type: ignore[union-attr]
            and (recorder.layer_name is None or recorder.layer_name in name)  # type: ignore[union-attr]
        ]
        if len(gates) != len(routers):
            raise _refused(causal_lm, f"gives the logits of {len(gates)} of its {len(routers)} routers")
        [(num_experts, top_k)] = sizes
        return cls(gates, recorder.index, num_experts, top_k, function)  # type: ignore[union-attr]

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """The logits `[N, E]` of every gate that runs within it, with their graph.

        They are kept as they come and nothing is computed of them here: under gradient checkpointing a layer
        must do the same when it is computed again.
        """
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            kept.append(output[self.index] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for gate in self.gates:
                stack.callback(gate.register_forward_hook(keep).remove)
            yield kept

    def loss(self, logits: Sequence[Tensor], attention_mask_BS: Tensor) -> Tensor:
        """Of one micro-batch; a scalar with gradient, in float32."""
        if len(logits) != len(self.gates):
            raise RuntimeError(f"{len(logits)} gates ran in one pass; the model has {len(self.gates)}")
        flat = tuple(gate.reshape(-1, self.num_experts).float() for gate in logits)
        loss: Tensor = self.function(flat, self.num_experts, self.top_k, attention_mask_BS)
        return loss


def _refused(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} {why}.",
        mend="Set training.router_aux_loss_coef to 0, or choose an MoE model whose configuration has that field.",
        code="no_load_balancing",
    )
