"""A causal language model that answers with token scores instead of logits.

    B, S  samples and positions of a micro-batch     M  predicted tokens     D  width     V  vocabulary

Backbone over all positions, vocabulary projection over the M that are asked for. The chunked
projection is the `forward` of the head module itself, so that whoever hooks modules (DeepSpeed
ZeRO-3 gathers a partitioned weight before a module's forward and backward) sees an ordinary layer.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modeseek_ray.errors import ModelError, NumericsError
from modeseek_ray.objectives.logprobs import (
    Head,
    KlDirection,
    TokenScores,
    token_kl,
    token_kls,
    token_scores,
)


class Reference(NamedTuple):
    """The frozen distribution a KL is measured against, at the same M positions."""

    hidden_MD: Tensor
    direction: KlDirection | Literal["both"]  # both: for evaluation, without gradient
    head: Head | None = None  # None = the policy's own head: it is frozen (LoRA) and shared


class ScoringHead(nn.Linear):
    """The model's output layer. Called with targets it scores them; without, it gives logits as ever."""

    @classmethod
    def adopt(cls, linear: nn.Linear) -> ScoringHead:
        """A head around the same parameters, so that tied embeddings stay tied."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self,
        hidden_MD: Tensor,
        target_M: Tensor | None = None,
        scale: float = 1.0,
        statistics: bool = False,
        reference: Reference | None = None,
        entropy: bool = False,
        announced_M: Tensor | None = None,
    ) -> Tensor | TokenScores:
        if target_M is None:
            return super().forward(hidden_MD)
        scores = token_scores(
            hidden_MD,
            self.weight,
            target_M,
            bias_V=self.bias,
            temperature=1 / scale,
            entropy=entropy,
            statistics=statistics,
            announced_M=announced_M,
        )
        if reference is None:
            return scores
        own = Head(self.weight, self.bias, scale)
        start = reference.head or own
        if reference.direction == "both":
            forward_M, reverse_M = token_kls(hidden_MD, own, reference.hidden_MD, start)
            return scores._replace(kl_M=forward_M, kl_reverse_M=reverse_M)
        kl_M = token_kl(hidden_MD, own, reference.hidden_MD, start, direction=reference.direction)
        return scores._replace(kl_M=kl_M)


class ScoringModel(nn.Module):
    """Wraps any transformers causal LM, also one that PEFT has wrapped. Build it before DeepSpeed's engine.

    At set-up a few tokens are sent through the model's own forward pass: the constant by which the
    architecture multiplies its logits is measured, and a model whose logits are anything but a
    multiple of head(backbone(tokens)) is refused with `NumericsError`.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        """`model` is changed in place: its output layer becomes a `ScoringHead` on the same parameters."""
        super().__init__()
        self.model = model
        causal_lm = unwrap(model)
        head = causal_lm.get_output_embeddings()
        if causal_lm.base_model is causal_lm or not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(causal_lm).__name__} has no backbone, or no linear head ({type(head).__name__}).",
                mend="Choose a decoder-only language model; keep lm_head out of LoRA's target_modules.",
            )
        if not isinstance(head, ScoringHead):
            causal_lm.set_output_embeddings(ScoringHead.adopt(head))
        self.scale = measure_scale(causal_lm) / temperature
        self.heeds_padding = heeds_padding(causal_lm)

    @property
    def backbone(self) -> nn.Module:
        """Gives last hidden states, final norm included."""
        backbone: nn.Module = unwrap(self.model).base_model
        return backbone

    @property
    def head(self) -> ScoringHead:
        head: ScoringHead = unwrap(self.model).get_output_embeddings()
        return head

    def frozen_head(self) -> Head:
        """A copy of the head as it is now, to measure a KL against later. Whole weights only (not ZeRO-3)."""
        bias_V = self.head.bias
        return Head(
            self.head.weight.detach().clone(), None if bias_V is None else bias_V.detach().clone(), self.scale
        )

    def forward(
        self,
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor | None,
        positions_M: Tensor,
        target_M: Tensor,
        position_ids_BS: Tensor | None = None,
        *,
        entropy: bool = False,
        statistics: bool = False,
        keep_hidden: bool = False,
        reference: Reference | None = None,
        announced_M: Tensor | None = None,
    ) -> TokenScores:
        """Score `target_M`; `positions_M` indexes B * S at the position that predicts each of them.

        Padding stands on the right. Where the model does not see it anyway it is not told of it: attention that is
        causal and nothing else has faster kernels (a fifth of a step at 2,048 positions on a CPU).

        `position_ids_BS` says which positions these are where they are not the first of their sequences.
        `entropy` adds the policy's, `statistics` that of its top tokens as well, `keep_hidden` the head's
        input, `reference` the KL against it. `announced_M` is the loss's gradient where it is known (`token_scores`).
        """
        more = {} if position_ids_BS is None else {"position_ids": position_ids_BS}
        if position_ids_BS is None and not self.heeds_padding:
            attention_mask_BS = None
        hidden_BSD = self.backbone(
            input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False, **more
        ).last_hidden_state
        hidden_MD = hidden_BSD.flatten(0, 1).index_select(0, positions_M)
        scores: TokenScores = self.head(
            hidden_MD, target_M, self.scale, statistics, reference, entropy, announced_M
        )
        return scores._replace(hidden_M=hidden_MD.detach()) if keep_hidden else scores


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


@torch.no_grad()
def measure_scale(causal_lm: Any) -> float:
    """The constant by which the model multiplies its head's output (1 for most, granite and cohere differ).

    The model's own forward pass runs with a ramp in place of the head's output: what becomes of the
    ramp is exactly what the architecture does to its logits. Raises `NumericsError` where that is not
    a multiple (soft-capping), or where the head is fed something else than the backbone's last hidden state.
    """
    device = next(causal_lm.parameters()).device
    input_ids_BS = (torch.arange(4, device=device) % causal_lm.config.get_text_config().vocab_size)[None]
    inputs = {"input_ids": input_ids_BS, "attention_mask": torch.ones_like(input_ids_BS), "use_cache": False}
    fed: list[Tensor] = []
    ramps: list[Tensor] = []

    def replace(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fed.append(arguments[0])
        ramps.append(torch.linspace(-60, 60, output.numel(), device=device).view_as(output))
        return ramps[0]

    was_training = causal_lm.training
    hook = causal_lm.get_output_embeddings().register_forward_hook(replace)
    try:
        causal_lm.eval()
        logits = causal_lm(**inputs).logits.double()
        hidden = causal_lm.base_model(**inputs).last_hidden_state
    finally:
        hook.remove()
        causal_lm.train(was_training)
    ramp = ramps[0].double()
    scale = float((logits * ramp).sum() / (ramp * ramp).sum())
    _refuse_unless_equal(causal_lm, "hidden state fed to the head", fed[0].double(), hidden.double())
    _refuse_unless_equal(causal_lm, "logit, for one constant times the head's output", logits, scale * ramp)
    return 1.0 if abs(scale - 1) < 1e-6 else scale


@torch.no_grad()
def heeds_padding(causal_lm: Any) -> bool:
    """Whether tokens differ by what stands on their right, unless a mask hides it.

    Under causal attention they do not; it is looked at all the same, in two sequences of which one is half padding.
    """
    device = next(causal_lm.parameters()).device
    ids_BS = (torch.arange(16, device=device) % causal_lm.config.get_text_config().vocab_size).view(2, 8)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 4:] = 0
    was_training = causal_lm.training
    try:
        causal_lm.eval()
        told, untold = (
            causal_lm.base_model(input_ids=ids_BS, attention_mask=mask, use_cache=False).last_hidden_state
            for mask in (mask_BS, None)
        )
    finally:
        causal_lm.train(was_training)
    off = (told - untold)[mask_BS.bool()].abs().max()
    # Other kernels round otherwise; what sees the padding is off by far more.
    return bool(off > (1e-5 if told.dtype == torch.float32 else 2e-2) * told.abs().max())


def _refuse_unless_equal(causal_lm: Any, what: str, own: Tensor, ours: Tensor) -> None:
    if own.shape == ours.shape:
        worst = int((own - ours).abs().argmax())
        own_value, our_value = float(own.flatten()[worst]), float(ours.flatten()[worst])
        if abs(own_value - our_value) <= 1e-4 * float(own.abs().max()):
            return
        figures = f"{own_value:.6g} in the model's own pass, {our_value:.6g} in ours"
    else:
        figures = f"shape {tuple(own.shape)} in the model's own pass, {tuple(ours.shape)} in ours"
    raise NumericsError(
        f"{type(causal_lm).__name__} cannot be scored: {what}: {figures}.",
        mend="Models that soft-cap or otherwise bend their final logits are not supported; choose another.",
    )
