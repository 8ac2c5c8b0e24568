"""A frozen model that says how likely samples are: pi_0, or the checkpoint that stands for the data.

A plain class. Online groups are scored through `score`, by a pool of these; an offline data set
through `scoring.py`, by Ray Data over the same class.

    N  samples asked for      B  samples of one micro-batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.messages import Picks
from modeseek_ray.data.batching import pack
from modeseek_ray.errors import ConfigError, NumericsError
from modeseek_ray.routing.wire import Routes, split_batch
from modeseek_ray.types import FloatArray, IntArray, Sample


@dataclass(frozen=True)
class ScoringSpec:
    """The frozen model and how it computes. Everything here changes bits of the scores."""

    model_path: str  # a Hugging Face directory
    dtype: Literal["float32", "bfloat16"] = "float32"
    temperature: float = 1.0
    micro_batch_tokens: int = 8192  # most positions computed at once, padding included
    cpus_per_worker: float = 1.0  # also torch's threads, rounded down, at least one
    gpus_per_worker: float = 0.0
    with_routes: bool = False  # MoE: also keep the experts that were asked, for R0

    @property
    def num_threads(self) -> int:
        return max(1, int(self.cpus_per_worker))


class Scored(NamedTuple):
    """Samples under the frozen model, in the order they were asked for."""

    tokens: list[NDArray[np.float64]]  # log-probability of each trained token, nats
    routes: list[Routes] | None  # `[T - 1, L, K]` in wire form, where the spec asks for them


class ReferenceModel:
    """Loads the model when constructed; the weights never change."""

    def __init__(self, spec: ScoringSpec) -> None:
        """Raises `ModelError` if it cannot be loaded or has no routes to keep, `NumericsError` for bent logits."""
        import torch

        from actors.modeling import load_causal_lm
        from modeseek_ray.objectives.model import ScoringModel

        if spec.gpus_per_worker and not torch.cuda.is_available():
            raise ConfigError(
                "the job asks for GPUs, and torch finds none in this process.",
                param="resources.gpus_per_worker",
                mend="Set it to 0, or install the CUDA requirements.",
            )
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._device = torch.device("cuda" if spec.gpus_per_worker else "cpu")
        model = load_causal_lm(spec.model_path, spec.dtype)
        self._model = ScoringModel(model, temperature=spec.temperature).requires_grad_(False).eval()
        self._model.to(self._device)
        self._num_experts = 0
        if spec.with_routes:
            from modeseek_ray.routing.hooks import record_routes

            self._num_experts = record_routes(self._model).layers.num_experts

    def score(self, picks: Picks, *blocks: Sequence[Sample]) -> FloatArray:
        """Log-probability of each picked sample, summed over its trained tokens, [N] nats."""
        return np.array([tokens_T.sum() for tokens_T in self.score_tokens(picks, *blocks)], dtype=np.float64)

    def score_tokens(self, picks: Picks, *blocks: Sequence[Sample]) -> list[NDArray[np.float64]]:
        """The same per trained token, left to right. Micro-batches are of similar length."""
        return self._scored([blocks[position][index] for position, index in picks]).tokens

    def score_routed(self, picks: Picks, *blocks: Sequence[Sample]) -> Iterator[FloatArray | list[Routes]]:
        """What `score` answers, and then the experts each sample asked, for `with_start_routes`."""
        scored = self._scored([blocks[position][index] for position, index in picks])
        yield np.array([tokens_T.sum() for tokens_T in scored.tokens], dtype=np.float64)
        yield scored.routes or []

    def with_start_routes(
        self, picks: Picks, orders: Sequence[IntArray], *parts: Sequence[Any]
    ) -> Iterator[list[Sample]]:
        """The picked samples, each with its routes, as one block: routes need not pass through the caller.

        `parts` are the blocks that `picks` go into, then one list of routes for each of `orders`, which says
        where among the picks they belong.
        """
        blocks, routes = parts[: len(parts) - len(orders)], parts[len(parts) - len(orders) :]
        of: dict[int, Routes] = {}
        for order_N, routes_N in zip(orders, routes, strict=True):
            of.update(zip(order_N.tolist(), routes_N, strict=True))
        yield [
            replace(blocks[position][index], start_routes_TLK=of[n])
            for n, (position, index) in enumerate(picks)
        ]

    def _scored(self, samples: Sequence[Sample]) -> Scored:
        length_N = np.array([s.length for s in samples], dtype=np.int64)
        tokens: list[NDArray[np.float64]] = [np.zeros(0)] * len(samples)
        routes: list[Routes] = [np.zeros(0, dtype=np.uint8)] * len(samples)
        for index_B in pack(length_N, self._spec.micro_batch_tokens):
            scored = self.score_micro_batch([samples[i] for i in index_B])
            for b, i in enumerate(index_B):
                tokens[i] = scored.tokens[b]
                if scored.routes is not None:
                    routes[i] = scored.routes[b]
        return Scored(tokens, routes if self._spec.with_routes else None)

    def score_micro_batch(self, samples: Sequence[Sample]) -> Scored:
        """One forward pass over exactly these samples, in this order: the same call gives the same bits.

        Raises `NumericsError` naming the rows whose log-probabilities are not finite.
        """
        import torch

        from modeseek_ray.objectives.collate import collate
        from modeseek_ray.routing.hooks import record_routes

        batch = collate(samples, range(len(samples)), pad_id=0).to(self._device)
        recording = record_routes(self._model) if self._spec.with_routes else None
        with torch.inference_mode(), recording or nullcontext():
            scores = self._model(
                batch.input_ids_BS, batch.attention_mask_BS, batch.positions_M, batch.target_M
            )
        log_prob_M = scores.log_prob_M.double().cpu().numpy()
        if not np.isfinite(log_prob_M).all():
            bad_B = np.unique(batch.sample_M.cpu().numpy()[~np.isfinite(log_prob_M)])
            raise NumericsError(
                f"log-probabilities of row(s) {[samples[b].row for b in bad_B]} are not finite.",
                mend="Check that the model's weights are finite, or score in float32.",
            )
        ends = np.cumsum(batch.num_tokens_B.cpu().numpy())[:-1]
        routes = None
        if recording is not None:
            routes = split_batch(recording.routes, [s.length for s in samples], self._num_experts)
        return Scored(np.split(log_prob_M, ends), routes)

    def features(self, samples: Sequence[Sample]) -> FloatArray:
        """Mean over each sample's trained tokens of the hidden states that predict them, [N, D]."""
        import torch

        from modeseek_ray.objectives.collate import collate

        length_N = np.array([s.length for s in samples], dtype=np.int64)
        rows: list[FloatArray] = [np.zeros(0)] * len(samples)
        for index_B in pack(length_N, self._spec.micro_batch_tokens):
            batch = collate(samples, index_B, pad_id=0).to(self._device)
            with torch.inference_mode():
                scores = self._model(
                    batch.input_ids_BS,
                    batch.attention_mask_BS,
                    batch.positions_M,
                    batch.target_M,
                    keep_hidden=True,
                )
            hidden_MD = scores.hidden_M.double().cpu().numpy()
            ends = np.cumsum(batch.num_tokens_B.cpu().numpy())[:-1]
            for i, part_TD in zip(index_B, np.split(hidden_MD, ends), strict=True):
                rows[i] = part_TD.mean(axis=0)
        return np.stack(rows)

    def close(self) -> None:
        """Nothing outlives the object; pools call this on every worker."""
