"""What token ratios looked like: sums that ranks can add up, the figures made of them, and their warnings.

No torch here: the driver and the pools read these. delta_t = ratio_t - 1 of each trained token, for one
of three ratios (METHODS.md section 4):

    ratio/      pi_theta / pi_old: the policy now over what the clip compares it with (staleness)
    mismatch/   the trainer's policy when the batch was begun over the sampler's, pi_old / pi_sampler
    weighting/  the weighting's own `of`, where it reads it to first order
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

DELTA_LIMIT = 0.5  # above it a first-order reading of the ratios no longer holds (METHODS.md section 4)

# Flat names, each under `ratio/`, `mismatch/` and `weighting/`. p is the numerator's policy, q the denominator's.
FIGURES: Mapping[str, str] = {
    "mean_abs_delta": "mean over tokens of |delta|",
    "max_abs_delta": "largest |delta| of a token",
    "std_delta": "deviation of delta over tokens",
    "mean_abs_sum_delta": "mean over samples of |sum_t delta|",
    "max_abs_sum_delta": "largest |sum_t delta| of a sample",
    "mean_sum_squared_delta": "mean over samples of sum_t delta^2",
    "max_sum_squared_delta": "largest sum_t delta^2 of a sample",
    "far_samples": "share of samples with |sum_t delta| or sum_t delta^2 above 0.5",
    "clipped_low": "share of tokens whose factor the lower bound changed",
    "clipped_high": "share of tokens whose factor the upper bound changed",
    "chi_squared": "chi^2(p || q) as mean delta^2 over tokens, which q drew",
    "kl_k3": "KL(q || p) as the mean of ratio - 1 - log ratio (k3) over tokens, which q drew; nats per token",
    "over_two": "share of tokens with max(p/q, q/p) > 2",
}

_LARGEST = {"max_abs_delta", "max_abs_sum_delta", "max_sum_squared_delta"}


@dataclass(frozen=True)
class DeltaSums:
    """Sums over some tokens and samples; `+` is the same over both lots, exact whatever the cut.

    >>> one = DeltaSums(num_tokens=1, num_samples=1, abs_delta=0.5, squared_delta=0.25, max_abs_delta=0.5)
    >>> (one + DeltaSums(num_tokens=3, num_samples=1)).figures("ratio")["ratio/mean_abs_delta"]
    0.125
    """

    num_tokens: int = 0
    num_samples: int = 0
    delta: float = 0.0
    abs_delta: float = 0.0
    squared_delta: float = 0.0
    abs_sum_delta: float = 0.0  # over samples, of |sum_t delta|
    num_far: int = 0  # samples beyond DELTA_LIMIT
    num_clipped_low: int = 0  # tokens
    num_clipped_high: int = 0
    k3: float = 0.0
    num_over_two: int = 0
    max_abs_delta: float = 0.0
    max_abs_sum_delta: float = 0.0
    max_sum_squared_delta: float = 0.0

    def __add__(self, other: DeltaSums) -> DeltaSums:
        def both(name: str) -> float:
            mine, theirs = getattr(self, name), getattr(other, name)
            return max(mine, theirs) if name in _LARGEST else mine + theirs

        return DeltaSums(**{f.name: both(f.name) for f in fields(self)})  # type: ignore[arg-type]

    def figures(self, of: str) -> dict[str, float]:
        """The figures under their flat names, `of` in front; {} where there was no token."""
        if self.num_tokens == 0:
            return {}
        tokens, samples = self.num_tokens, self.num_samples
        mean, mean_square = self.delta / tokens, self.squared_delta / tokens
        found = {
            "mean_abs_delta": self.abs_delta / tokens,
            "max_abs_delta": self.max_abs_delta,
            "std_delta": math.sqrt(max(0.0, mean_square - mean**2)),
            "mean_abs_sum_delta": self.abs_sum_delta / samples,
            "max_abs_sum_delta": self.max_abs_sum_delta,
            "mean_sum_squared_delta": self.squared_delta / samples,
            "max_sum_squared_delta": self.max_sum_squared_delta,
            "far_samples": self.num_far / samples,
            "clipped_low": self.num_clipped_low / tokens,
            "clipped_high": self.num_clipped_high / tokens,
            "chi_squared": mean_square,
            "kl_k3": self.k3 / tokens,
            "over_two": self.num_over_two / tokens,
        }
        return {f"{of}/{name}": value for name, value in found.items()}


_WATCHED = {
    "mean_abs_delta": "the mean |δ| of a token",
    "mean_abs_sum_delta": "the mean |Σδ| of a sample",
    "mean_sum_squared_delta": "the mean Σδ² of a sample",
}
_MEANING = {
    "ratio": (
        "the policy has moved far from the one that wrote the samples, or began the batch",
        "take fewer inner steps per batch, a lower max_staleness or a lower learning rate",
    ),
    "mismatch": (
        "the trainer and the sampler disagree about the samples",
        "look at staleness, dtypes and (MoE) routing_replay; prefer exact ratios to first_order",
    ),
    "weighting": (
        "1 + Σδ no longer says what the product of the token ratios is",
        "set likelihood.approximation: exact",
    ),
}


def ratio_warnings(figures: Mapping[str, float]) -> tuple[str, ...]:
    """One sentence per ratio whose mean |delta|, |sum delta| or sum delta^2 is above 0.5.

    >>> ratio_warnings({"ratio/mean_abs_delta": 0.1, "ratio/mean_abs_sum_delta": 0.5})
    ()
    >>> print(*ratio_warnings({"ratio/mean_abs_sum_delta": 0.75, "ratio/far_samples": 0.25}))
    ratio: the mean |Σδ| of a sample is 0.75 (limit 0.5; 25 % of samples beyond): the policy has moved far from \
the one that wrote the samples, or began the batch; take fewer inner steps per batch, a lower max_staleness or a \
lower learning rate.
    """
    found = []
    for of, (meaning, mend) in _MEANING.items():
        high = [
            f"{what} is {figures[f'{of}/{name}']:.3g}"
            for name, what in _WATCHED.items()
            if figures.get(f"{of}/{name}", 0.0) > DELTA_LIMIT
        ]
        if high:
            share = f"; {figures[f'{of}/far_samples']:.0%} of samples beyond".replace("%", " %")
            found.append(f"{of}: {', '.join(high)} (limit {DELTA_LIMIT:g}{share}): {meaning}; {mend}.")
    return tuple(found)
