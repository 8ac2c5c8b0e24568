"""Of a round's own samples: does the trainer say what the engine recorded that wrote them, by the same weights?

The canary of a sync is scored as prompts are; samples were decoded token by token, at their temperature, in
batches of their own. So they are compared as well, wherever the trainer scores them anyway.

    N  samples of a batch
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeseek_ray.errors import NumericsError
from modeseek_ray.types import Group

FLOAT32_LIMIT = 1e-3  # nats a token, of one sample; 1e-6 is usual


def refuse_other_log_probs(groups: Sequence[Group], version: int, *, sample: float, batch: float) -> None:
    """Raise `NumericsError` where samples that `version` wrote are further off than `sample` or, on average, `batch`.

    Both are nats a token. Call it with groups that the trainer scored while its weights were that version; those
    that nobody scored, that other weights wrote or that nobody recorded are left out.
    """
    known = [g for g in groups if g.log_policy_N is not None and g.log_behavior_N is not None]
    if not known:
        return
    ours_N, theirs_N, tokens_N, row_N = (
        np.concatenate([getattr(g, name) for g in known])
        for name in ("log_policy_N", "log_behavior_N", "num_tokens_N", "row_N")
    )
    by_N = np.concatenate(
        [np.full(len(g), -1) if g.weight_version_N is None else g.weight_version_N for g in known]
    )
    (mine,) = np.nonzero((by_N == version) & (tokens_N > 0) & ~np.isnan(theirs_N))
    if not len(mine):
        return
    off = np.abs(ours_N - theirs_N)[mine] / tokens_N[mine]
    off = np.where(np.isfinite(off), off, np.inf)
    worst = int(off.argmax())
    if off[worst] <= sample and off.mean() <= batch:
        return
    i = mine[worst]
    raise NumericsError(
        f"trainer and engine disagree about samples that both know by weights of version {version}: of row"
        f" {row_N[i]} the trainer says {ours_N[i]:.6f}, the engine that wrote it said {theirs_N[i]:.6f},"
        f" {off[worst]:.2e} nats a token apart over {tokens_N[i]} tokens; {off.mean():.2e} over {len(mine)} samples"
        f" (allowed: {sample:.1e} and {batch:.1e}).",
        mend="Every ratio to the sampler would be wrong by that. Look at dtypes and (MoE) routing_replay; to train on"
        " such samples all the same, with the difference corrected, set mismatch: {scheme: tis}.",
    )
