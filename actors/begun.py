"""What a rank keeps of a batch from `begin` until the next one: the policy as it was then.

T  tokens of one sample      M  trained tokens of a micro-batch      L, K  routers, experts per token
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from actors.forward import Forward, fingerprint
from actors.messages import RankBeginning, RouteCounts
from modeseek_ray.errors import DataError
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.objectives.ratios import delta_sums, mismatch_factor
from modeseek_ray.routing.compare import compare_routes
from modeseek_ray.routing.wire import Routes
from modeseek_ray.types import FloatArray, Objective, Sample


@dataclass(frozen=True)
class Past:
    """One sample under the policy the batch was begun with."""

    log_prob_T: Tensor  # float32, trained tokens alone, on the rank's device
    routes_TLK: Routes | None = None  # [T - 1, L, K] the trainer's own, where they were recorded
    # Under the older weights that wrote it, where the clip is to go by those (`compared_with_writers`).
    log_writer_T: Tensor | None = None


@dataclass
class Begun:
    """The batch by fingerprint. Equal samples (two answers of the same words) have an entry each."""

    _by_fingerprint: dict[bytes, list[Past]] = field(default_factory=dict)

    def clear(self) -> None:
        self._by_fingerprint.clear()

    def keep(self, samples: Sequence[Sample], forward: Forward) -> None:
        """Of one micro-batch: its log-probabilities, and its routes if they were recorded."""
        if forward.is_dummy:
            return
        sizes = forward.batch.num_tokens_B.tolist()
        columns = forward.scores.log_prob_M.detach().float().split(sizes)
        for b, (i, log_prob_T) in enumerate(zip(forward.index_B, columns, strict=True)):
            sample = samples[i]
            past = Past(log_prob_T.clone(), forward.routes_of(b, sample.length))
            self._by_fingerprint.setdefault(fingerprint(sample), []).append(past)

    def of(self, samples: Sequence[Sample]) -> list[Past] | None:
        """The past of each; None if one of them was not begun. The k-th of equal samples gets the k-th entry,
        so that one step over the whole batch compares each sample with its very own past."""
        seen: dict[bytes, int] = {}
        found = []
        for sample in samples:
            key = fingerprint(sample)
            copies = self._by_fingerprint.get(key)
            if copies is None:
                return None
            found.append(copies[seen.get(key, 0) % len(copies)])
            seen[key] = seen.get(key, 0) + 1
        return found


def compared_with_writers(samples: Sequence[Sample], past_N: Sequence[Past], version: int) -> list[Past]:
    """The same, but where older weights than `version` wrote a sample, its clip goes by their log-probabilities.

    Raises `DataError` for a stale sample that does not carry them.
    """
    stale = [s for s in samples if 0 <= s.weight_version < version]
    require(stale, "log_behavior_T", "log-probabilities of the older weights that wrote it")
    found = list(past_N)
    for i, sample in enumerate(samples):
        if 0 <= sample.weight_version < version and sample.log_behavior_T is not None:
            log_writer_T = np.asarray(sample.log_behavior_T, dtype=np.float32)[sample.trained_T]
            device = past_N[i].log_prob_T.device
            found[i] = replace(past_N[i], log_writer_T=torch.from_numpy(log_writer_T).to(device))
    return found


def log_past(past_N: Sequence[Past], forward: Forward) -> Tensor:
    """Under the policy the batch was begun with, a micro-batch's trained tokens, [M] float32."""
    return torch.cat([past_N[i].log_prob_T for i in forward.index_B])


def log_old(past_N: Sequence[Past], forward: Forward) -> Tensor:
    """log pi_old, which the clip goes by: of the writer where it is asked for, else as `log_past`."""
    pasts = [past_N[i] for i in forward.index_B]
    return torch.cat([p.log_prob_T if p.log_writer_T is None else p.log_writer_T for p in pasts])


def require(samples: Sequence[Sample], name: str, what: str) -> None:
    """Samples drawn for this job carry it; replay rows, which nobody sampled, need not. Raises `DataError`."""
    for sample in samples:
        if getattr(sample, name) is None and not sample.is_replay:
            raise DataError(
                f"row {sample.row} does not carry {what}.",
                mend="Train on samples that the job's own generator wrote, or drop that option.",
            )


class Measured:
    """Adds up what `begin` answers over its micro-batches: sums over tokens, and columns per sample."""

    def __init__(self, samples: Sequence[Sample], objective: Objective) -> None:
        self._samples = samples
        self._objective = objective
        self._log_policy_N = np.zeros(len(samples))
        self._sum_delta_N: FloatArray = np.full(len(samples), np.nan)
        self._distance_N: FloatArray | None = None
        self._mismatch = DeltaSums()
        self._weighting = DeltaSums()
        self._live_mismatch: DeltaSums | None = None
        self._routes: RouteCounts | None = None

    def add(self, forward: Forward) -> None:
        """One micro-batch of the pass that steps are compared with."""
        if forward.is_dummy:
            return
        log_prob_M = forward.scores.log_prob_M.detach()
        self._log_policy_N[forward.index_B] = forward.by_sample(log_prob_M)
        self._mismatch += self._against_sampler(forward)
        log_ratio_M = self._of_weighting(forward)
        if log_ratio_M is not None:
            self._sum_delta_N[forward.index_B] = forward.by_sample(log_ratio_M.double().expm1())
            batch = forward.batch
            self._weighting += delta_sums(log_ratio_M, batch.sample_M, len(batch.num_tokens_B))
        self._compare(forward)

    def add_live(self, forwards: Iterable[Forward]) -> None:
        """A pass with live routes, beside one that replays the sampler's: what replay has mended."""
        self._live_mismatch = DeltaSums()
        for forward in forwards:
            if not forward.is_dummy:
                self._live_mismatch += self._against_sampler(forward)
                self._compare(forward)

    def add_distances(self, forwards: Iterable[Forward]) -> None:
        """A pass that measured KL to the start."""
        self._distance_N = np.zeros(len(self._samples))
        for forward in forwards:
            if forward.scores.kl_M is not None and not forward.is_dummy:
                num_tokens_B = forward.batch.num_tokens_B.cpu().numpy()[: len(forward.index_B)]
                self._distance_N[forward.index_B] = forward.by_sample(forward.scores.kl_M) / num_tokens_B

    def result(self) -> RankBeginning:
        known_N = ~np.isnan(self._sum_delta_N)
        return RankBeginning(
            log_policy_N=self._log_policy_N,
            sum_delta_N=self._sum_delta_N if known_N.any() else None,
            distance_N=self._distance_N,
            mismatch=self._mismatch,
            weighting=self._weighting,
            live_mismatch=self._live_mismatch,
            routes=self._routes,
        )

    def _of_weighting(self, forward: Forward) -> Tensor | None:
        """log of the token ratio that the weighting reads to first order, NaN where its denominator is unknown."""
        of, log_prob_M = self._objective.delta_of, forward.scores.log_prob_M.detach()
        below_M = forward.batch.log_behavior_M if of == "policy_over_data" else forward.log_reference_M
        if of is None or below_M is None:
            return None
        return below_M - log_prob_M if of == "initial_over_policy" else log_prob_M - below_M

    def _against_sampler(self, forward: Forward) -> DeltaSums:
        batch = forward.batch
        if batch.log_behavior_M is None:
            return DeltaSums()
        log_ratio_M = forward.scores.log_prob_M.detach() - batch.log_behavior_M
        factor = None
        if self._objective.mismatch is not None:
            factor = mismatch_factor(
                log_ratio_M, batch.sample_M, batch.num_tokens_B, self._objective.mismatch
            )
        return delta_sums(log_ratio_M, batch.sample_M, len(batch.num_tokens_B), factor)

    def _compare(self, forward: Forward) -> None:
        """Live routes, where this pass recorded them, with those the sampler took."""
        for b, i in enumerate(forward.index_B):
            sample = self._samples[i]
            live_TLK = forward.routes_of(b, sample.length)
            if live_TLK is not None and sample.routes_TLK is not None:
                self._routes = (self._routes or RouteCounts()) + changed(live_TLK, sample.routes_TLK)


def changed(live_TLK: Routes, given_TLK: Routes) -> RouteCounts:
    """Where `live` asks another *set* of experts than `given`; positions that `given` leaves open do not count.

    >>> changed(np.array([[[1, 2]], [[0, 1]]]), np.array([[[2, 1]], [[0, 3]]]))
    RouteCounts(num_token_layers=2, num_changed_token_layers=1, num_tokens=2, num_changed_tokens=1, overlap_sum=1.5)
    """
    found = compare_routes(live_TLK, given_TLK)
    return RouteCounts(
        num_token_layers=found.num_token_layers,
        num_changed_token_layers=round(found.share_differing * found.num_token_layers),
        num_tokens=found.num_tokens,
        num_changed_tokens=round(found.share_tokens_changed * found.num_tokens),
        overlap_sum=found.overlap * found.num_token_layers,
    )
