"""Token factors c_it: how much each token counts inside its sample (METHODS.md section 4).

Pure functions of what is known about M predicted tokens, detached: no gradient flows through a
factor. Keyword defaults are the configuration (names and ranges: `parameters.py`); `FACTORS` is the
registry. A factor multiplies the sample's weight and is averaged with the same denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.logprobs import TOP


@dataclass(frozen=True)
class TokenEvidence:
    """What factors look at, per predicted token, nats. What a factor does not need may be None."""

    log_prob_M: Tensor  # under the policy, now
    top_entropy_M: Tensor | None = None  # of the policy, renormalised over the 20 likeliest tokens
    log_reference_M: Tensor | None = None  # under pi_0
    log_start_M: Tensor | None = None  # under the policy at the start of the inner loop


def dft(evidence: TokenEvidence, *, gamma: float = 1.0) -> Tensor:
    """c = p^gamma (2508.05629)."""
    return (gamma * evidence.log_prob_M).exp()


def psft(evidence: TokenEvidence, *, clip: float = 0.28) -> Tensor:
    """c = rho 1[rho <= 1 + clip], rho against the policy at the start of the inner loop (2508.17784)."""
    ratio_M = (evidence.log_prob_M - _given(evidence.log_start_M, "psft", "the inner loop's start")).exp()
    return torch.where(ratio_M <= 1 + clip, ratio_M, 0.0)


def eaft(evidence: TokenEvidence, *, alpha: float = 1.0) -> Tensor:
    """c = (H / ln 20)^alpha, H the entropy of the softmax renormalised over the top 20 (2601.02151)."""
    entropy_M = _given(evidence.top_entropy_M, "eaft", "entropies (statistics=True)")
    return (entropy_M.clamp(min=0) / math.log(TOP)).pow(alpha)


def infosft(evidence: TokenEvidence, *, threshold: float = 0.93) -> Tensor:
    """c = p relu(1 - logit p / logit threshold): zero for tokens already held (2605.14967)."""
    log_prob_M = evidence.log_prob_M.clamp(min=-80)  # p log p is zero there; an infinite logit would give NaN
    prob_M = log_prob_M.exp()
    logit_M = log_prob_M - torch.log1p(-prob_M)  # +inf at p = 1, where the factor is zero
    return prob_M * torch.relu(1 - logit_M / math.log(threshold / (1 - threshold)))


def ratio_token(
    evidence: TokenEvidence, *, gamma: float = 1.0, low: float = 0.2, high: float = 5.0
) -> Tensor:
    """c = clip((p / p_0)^gamma, low, high), p_0 under the frozen start."""
    log_ratio_M = evidence.log_prob_M - _given(
        evidence.log_reference_M, "ratio_token", "pi_0's log-probabilities"
    )
    return (gamma * log_ratio_M).exp().clamp(low, high)


def talr(evidence: TokenEvidence, *, tau: float | None = None, floor: float = 0.01) -> Tensor:
    """c = max(p^(1/tau), floor): harder tokens count less, none is dropped (2509.20758)."""
    if tau is None:
        raise ValueError("token factor talr needs tau, which the caller did not measure on the batch")
    return (evidence.log_prob_M / tau).exp().clamp(min=floor)


FACTORS: Mapping[str, Callable[..., Tensor]] = {
    "dft": dft,
    "psft": psft,
    "eaft": eaft,
    "infosft": infosft,
    "ratio_token": ratio_token,
    "talr": talr,
}


def token_factor(name: str, evidence: TokenEvidence, parameters: Mapping[str, float]) -> Tensor | None:
    """The factor of that name, [M] and without gradient; None for `none`, so that no product is computed."""
    if name == "none":
        return None
    if name not in FACTORS:
        raise ConfigError(
            f"there is no token factor {name!r}.",
            param="method.weighted.token.scheme",
            mend=f"Choose one of none, {', '.join(FACTORS)}.",
        )
    with torch.no_grad():
        return FACTORS[name](evidence, **parameters)


def _given(column_M: Tensor | None, factor: str, what: str) -> Tensor:
    if column_M is None:
        raise ValueError(f"token factor {factor} needs {what}, which the caller did not compute")
    return column_M
