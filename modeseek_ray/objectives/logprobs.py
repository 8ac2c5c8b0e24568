"""Token log-probabilities from hidden states, without ever holding the logits of all positions.

    M  positions that are trained on or scored      H  width of the model
    C  positions of one chunk                       V  vocabulary

The head's logits are computed chunk by chunk, reduced to a few numbers per position and thrown
away; the backward pass computes them again, for one third more work in the head. That is saved where
the loss's gradient is known before the forward pass, which then sums up what it sends back, and for the
chunks there is room to keep. Memory is C x V instead of M x V (and a multiple of it for autograd).
Products, softmax and sums are float32 whatever the model's dtype: in bfloat16 a log-probability is
.03-.05 nats off, which ruins every ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modeseek_ray.objectives.head import (
    Gradients,
    Head,
    Kept,
    Logits,
    block_rows,
    default_chunk,
    parts,
)

KlDirection = Literal["forward", "reverse"]

TOP = 20  # entries of the renormalised distribution that `eaft` looks at (2601.02151)


class TokenScores(NamedTuple):
    """What is known of M predicted tokens. A tuple, so that DeepSpeed's hooks find the tensors in it.

    Only `log_prob_M` and `kl_M` carry gradients.
    """

    log_prob_M: Tensor  # float32, nats
    correct_M: Tensor  # bool: no token is likelier (a tie counts as correct)
    entropy_M: Tensor | None = None  # nats, over the whole vocabulary
    top_entropy_M: Tensor | None = None  # nats, of the softmax renormalised over the `TOP` likeliest tokens
    kl_M: Tensor | None = None  # nats, against the reference that was handed in
    kl_reverse_M: Tensor | None = None  # the same in the other direction, where both were asked for
    hidden_M: Tensor | None = None  # [M, H], detached, where asked for


def token_scores(
    hidden_MD: Tensor,
    head_weight_VD: Tensor,
    target_M: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk_positions: int | None = None,
    entropy: bool = False,
    statistics: bool = False,
    announced_M: Tensor | None = None,
) -> TokenScores:
    """Log-probability of `target_M` under softmax(hidden @ weight.T / temperature), float32.

    Differentiable in hidden, weight and bias. `entropy` adds `entropy_M`, for about a twentieth of the
    head's time; `statistics` both entropies. `chunk_positions` None = `default_chunk`.

    `announced_M`, [M] float32, is d loss / d log_prob_M where that is known beforehand. What it sends back is
    then summed up in this same pass: three products of the head's size instead of four. Bit for bit the same
    comes out; a backward pass that is called with another gradient computes it as if nothing had been announced.
    """
    size = chunk_positions or default_chunk(head_weight_VD)
    log_prob_M, correct_M, entropy_M, top_entropy_M = _TokenScores.apply(
        hidden_MD,
        head_weight_VD,
        bias_V,
        target_M,
        1.0 / temperature,
        size,
        entropy or statistics,
        statistics,
        announced_M,
        Kept() if torch.is_grad_enabled() and announced_M is None else None,
    )
    return TokenScores(log_prob_M, correct_M, entropy_M, top_entropy_M)


def token_kl(
    hidden_MD: Tensor,
    head: Head,
    hidden_ref_MD: Tensor,
    head_ref: Head,
    *,
    direction: KlDirection,
    chunk_positions: int | None = None,
) -> Tensor:
    """KL per position over the whole vocabulary, [M] float32 nats; differentiable in the policy alone.

    `forward` is KL(reference || policy), `reverse` KL(policy || reference) (METHODS.md section 5).
    """
    size = chunk_positions or max(1, default_chunk(head.weight_VD) // 2)
    with torch.no_grad():
        hidden_ref_MD = hidden_ref_MD.detach()
        head_ref = Head(
            head_ref.weight_VD.detach(),
            None if head_ref.bias_V is None else head_ref.bias_V.detach(),
            head_ref.scale,
        )
    kl_M: Tensor = _TokenKl.apply(
        hidden_MD, head.weight_VD, head.bias_V, head.scale, hidden_ref_MD, head_ref, direction, size
    )
    return kl_M


@torch.no_grad()
def token_kls(
    hidden_MD: Tensor,
    head: Head,
    hidden_ref_MD: Tensor,
    head_ref: Head,
    *,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(KL(reference || policy), KL(policy || reference)) per position, [M] float32 nats each; no gradient."""
    size = chunk_positions or max(1, default_chunk(head.weight_VD) // 2)
    policy, reference = Logits(hidden_MD, head, size), Logits(hidden_ref_MD, head_ref, size)
    forward_M, reverse_M = policy.buffer_CV.new_empty(2, len(hidden_MD))
    for part in parts(len(hidden_MD), size):
        log_policy_CV, log_ref_CV = policy(part).log_softmax(1), reference(part).log_softmax(1)
        difference_CV = log_ref_CV - log_policy_CV
        forward_M[part] = log_ref_CV.exp_().mul_(difference_CV).sum(1)
        reverse_M[part] = -log_policy_CV.exp_().mul_(difference_CV).sum(1)
    return forward_M, reverse_M


class _TokenScores(torch.autograd.Function):
    """Forward keeps hidden states; backward computes the logits again, unless its gradient was announced."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        scale: float,
        size: int,
        entropy: bool,
        top_entropy: bool,
        announced_M: Tensor | None,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        logits = Logits(hidden_MD, Head(weight_VD, bias_V, scale), size)
        gradients = None
        if announced_M is not None:
            gradients = Gradients(logits, ctx.needs_input_grad[:3])
        num_positions = len(hidden_MD)
        log_prob_M, entropy_M, top_entropy_M, highest_M, total_M = logits.buffer_CV.new_empty(
            5, num_positions
        )
        correct_M = torch.empty(num_positions, dtype=torch.bool, device=hidden_MD.device)
        for part in parts(num_positions, size):
            chunk_CV = logits(part)
            kept_CV = None if kept is None else kept.room_for(part.start, chunk_CV)
            exp_BV = None
            if entropy and kept_CV is None:
                exp_BV = torch.empty_like(chunk_CV[: block_rows(chunk_CV)])
            for rows, logits_RV in _blocks(chunk_CV, part.start):
                target_R1 = target_M[rows, None]
                target_R = logits_RV.gather(1, target_R1).squeeze(1)
                highest_R = logits_RV.amax(1)
                correct_M[rows] = target_R >= highest_R
                if top_entropy:
                    top_entropy_M[rows] = _top_entropy(logits_RV)
                below_RV = logits_RV.sub_(highest_R[:, None])
                if kept_CV is not None:  # exp(logit - highest) is what is kept
                    exp_RV = kept_CV[rows.start - part.start : rows.stop - part.start]
                else:
                    exp_RV = logits_RV if exp_BV is None else exp_BV[: len(logits_RV)]
                torch.exp(below_RV, out=exp_RV)
                total_R = exp_RV.sum(1)
                log_total_R = total_R.log()
                log_prob_M[rows] = target_R - highest_R - log_total_R
                highest_M[rows], total_M[rows] = highest_R, total_R
                if entropy:  # -sum p log p, where log p = below - log total
                    entropy_M[rows] = log_total_R - below_RV.mul_(exp_RV).sum(1) / total_R
                if announced_M is not None:
                    _to_gradient(exp_RV, total_R, target_R1, announced_M[rows], out=logits_RV)
            if gradients is not None:
                gradients.add(part, chunk_CV)
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, target_M, highest_M, total_M, announced_M)
        ctx.scale, ctx.size, ctx.gradients, ctx.kept = scale, size, gradients, kept
        found = [correct_M, entropy_M] if entropy else [correct_M]
        if top_entropy:
            found.append(top_entropy_M)
        ctx.mark_non_differentiable(*found)
        return log_prob_M, *found, *[None] * (3 - len(found))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, target_M, highest_M, total_M, announced_M = ctx.saved_tensors
        gradients = ctx.gradients
        ctx.gradients = None  # used up, as what is kept: a second backward pass computes again
        if gradients is None or not torch.equal(grad_M, announced_M):
            logits = Logits(hidden_MD, Head(weight_VD, bias_V, ctx.scale), ctx.size)
            gradients = Gradients(logits, ctx.needs_input_grad[:3])
            for part in parts(len(hidden_MD), ctx.size):
                kept_CV = None if ctx.kept is None else ctx.kept.take(part.start)
                chunk_CV = logits(part) if kept_CV is None else kept_CV
                for rows, exp_RV in _blocks(chunk_CV, part.start):
                    if kept_CV is None:
                        exp_RV.sub_(highest_M[rows, None]).exp_()
                    _to_gradient(exp_RV, total_M[rows], target_M[rows, None], grad_M[rows], out=exp_RV)
                gradients.add(part, chunk_CV)
        return *gradients.result(hidden_MD, weight_VD, bias_V), *[None] * 7


def _blocks(logits_CV: Tensor, start: int) -> Iterator[tuple[slice, Tensor]]:
    """A chunk block by block: which of all positions these are, and their logits, a view."""
    for rows in parts(len(logits_CV), block_rows(logits_CV)):
        yield slice(start + rows.start, start + rows.stop), logits_CV[rows]


def _to_gradient(exp_RV: Tensor, total_R: Tensor, target_R1: Tensor, grad_R: Tensor, *, out: Tensor) -> None:
    """d loss / d logits = grad x (onehot(target) - softmax), where grad is d loss / d log p(target)."""
    torch.mul(exp_RV, (-grad_R / total_R)[:, None], out=out).scatter_add_(1, target_R1, grad_R[:, None])


class _TokenKl(torch.autograd.Function):
    """Both heads chunk by chunk, forward and again backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        hidden_ref_MD: Tensor,
        head_ref: Head,
        direction: KlDirection,
        size: int,
    ) -> Tensor:
        policy = Logits(hidden_MD, Head(weight_VD, bias_V, scale), size)
        reference = Logits(hidden_ref_MD, head_ref, size)
        kl_M = policy.buffer_CV.new_empty(len(hidden_MD))
        for part in parts(len(hidden_MD), size):
            log_policy_CV = policy(part).log_softmax(1)
            log_ref_CV = reference(part).log_softmax(1)
            if direction == "forward":
                kl_M[part] = (log_ref_CV - log_policy_CV).mul_(log_ref_CV.exp_()).sum(1)
            else:
                kl_M[part] = (log_policy_CV - log_ref_CV).mul_(log_policy_CV.exp_()).sum(1)
        ctx.save_for_backward(
            hidden_MD, weight_VD, bias_V, hidden_ref_MD, head_ref.weight_VD, head_ref.bias_V, kl_M
        )
        ctx.scales, ctx.direction, ctx.size = (scale, head_ref.scale), direction, size
        return kl_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, hidden_ref_MD, weight_ref_VD, bias_ref_V, kl_M = ctx.saved_tensors
        policy = Logits(hidden_MD, Head(weight_VD, bias_V, ctx.scales[0]), ctx.size)
        reference = Logits(hidden_ref_MD, Head(weight_ref_VD, bias_ref_V, ctx.scales[1]), ctx.size)
        gradients = Gradients(policy, ctx.needs_input_grad[:3])
        for part in parts(len(hidden_MD), ctx.size):
            log_policy_CV = policy(part).log_softmax(1)
            log_ref_CV = reference(part).log_softmax(1)
            if ctx.direction == "forward":  # d KL(ref || policy) / d logits = policy - ref
                grad_CV = log_policy_CV.exp_().sub_(log_ref_CV.exp_())
            else:  # d KL(policy || ref) / d logits = policy * (log policy - log ref - KL)
                grad_CV = (
                    log_ref_CV.neg_().add_(log_policy_CV).sub_(kl_M[part, None]).mul_(log_policy_CV.exp_())
                )
            gradients.add(part, grad_CV.mul_(grad_M[part, None]))
        return *gradients.result(hidden_MD, weight_VD, bias_V), None, None, None, None, None


def _top_entropy(logits_RV: Tensor) -> Tensor:
    """Entropy per row of the softmax over the `TOP` largest logits, nats."""
    top_RK = logits_RV.topk(min(TOP, logits_RV.shape[1]), dim=1).values
    log_prob_RK = top_RK.log_softmax(1)
    return -(log_prob_RK.exp() * log_prob_RK).sum(1)
