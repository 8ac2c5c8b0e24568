"""Forward passes of one rank over its samples, micro-batch by micro-batch.

    N  this rank's samples      B  samples of one micro-batch      M  trained tokens of a micro-batch

A rank cuts its samples into micro-batches of similar length. Ranks differ in how many they need, but
ZeRO's collectives run in every forward and backward pass, so all go through as many as the rank with
most: those with fewer compute a two-token sample of weight zero, a dummy.

Ranks that share their samples (`sequence.py`) each compute a part of every micro-batch; what a `Forward`
says is of the whole one, on all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine import ZeroEngine
from actors.lora import adapters_off
from actors.sequence import Part, SequenceGroup
from modeseek_ray.config import Resources
from modeseek_ray.data.batching import pack
from modeseek_ray.errors import ModelError
from modeseek_ray.objectives.collate import Batch, collate
from modeseek_ray.objectives.logprobs import TokenScores
from modeseek_ray.objectives.loss import sum_by_sample
from modeseek_ray.objectives.model import Reference, ScoringModel, unwrap
from modeseek_ray.routing.balance import LoadBalancing
from modeseek_ray.routing.hooks import Recording, Replay, record_routes, replay_routes
from modeseek_ray.routing.wire import Routes, batch_routes
from modeseek_ray.types import FloatArray, IntArray, Objective, Sample

_DUMMY = Sample(row=-1, token_ids_T=np.zeros(2, dtype=np.int32), trained_T=np.array([False, True]))
_NO_SAMPLES: IntArray = np.zeros(0, dtype=np.int64)


# The gradient of the loss by a micro-batch's log-probabilities, [M] float32, or None where it is not known before
# them. Of the micro-batch's samples (`index_B`; none for a dummy) and the micro-batch.
Announce = Callable[[IntArray, Batch], Tensor | None]


@dataclass(frozen=True)
class Routing:
    """Which experts an MoE model's pass asks: those of `replayed_N` (wire form, one entry per sample of the
    rank, None = live), or live ones, which may be recorded. Dummies are routed live."""

    replayed_N: Sequence[Routes | None] | None = None
    record: bool = False


LIVE_ROUTING = Routing()


@dataclass(frozen=True)
class Forward:
    """One micro-batch and what a forward pass said about it."""

    index_B: IntArray  # positions among this rank's samples; empty for a dummy
    batch: Batch
    scores: TokenScores
    log_reference_M: Tensor | None = None  # under pi_0, where a token factor asks for it
    routes_BSLK: NDArray[np.int16] | None = None  # where they were recorded
    load_L: tuple[IntArray, ...] | None = (
        None  # MoE, in training: tokens of each expert by routers' own choice
    )
    balance: Tensor | None = None  # the load-balancing loss, with gradient, where it is asked for

    @property
    def is_dummy(self) -> bool:
        return len(self.index_B) == 0

    def by_sample(self, column_M: Tensor) -> FloatArray:
        """A per-token column summed over each sample's tokens, [B] float64; nothing for a dummy."""
        total_B = sum_by_sample(column_M, self.batch.sample_M, len(self.batch.num_tokens_B))
        return total_B.cpu().numpy()[: len(self.index_B)]

    def routes_of(self, b: int, length: int) -> NDArray[np.int16] | None:
        """The recorded routes of its b-th sample in wire form, a copy; None where none were recorded."""
        return None if self.routes_BSLK is None else self.routes_BSLK[b, : length - 1].copy()


class ForwardPasses:
    """Cuts samples into micro-batches and sends them through the model, with or without gradient."""

    def __init__(
        self,
        engine: ZeroEngine,
        module: ScoringModel,
        objective: Objective,
        resources: Resources,
        sequence: SequenceGroup,
        frozen: ScoringModel | None = None,
    ) -> None:
        """`frozen` is pi_0 where the objective needs it beside the policy and there is no adapter to switch off.

        Raises `ModelError` for a load-balancing loss of a model that has none.
        """
        self._engine = engine
        self._module = module
        self._objective = objective
        self._resources = resources
        self._sequence = sequence
        self._frozen = frozen
        self._frozen_head = None if frozen is None else frozen.frozen_head()
        self._routed_model = has_routes(module)
        self._balancing = None
        if objective.router_aux_loss_coef > 0:
            self._balancing = LoadBalancing.of(module, unwrap(module.model))

    def cut(self, samples: Sequence[Sample]) -> list[IntArray]:
        """Micro-batches of this rank, filled up with empty ones to the most any rank has. Collective.

        Limits are on what one rank computes: of a sequence that is shared, its own part.
        """
        length_N = np.array([-(-s.length // self._sequence.size) for s in samples], dtype=np.int64)
        cuts = pack(length_N, self._resources.micro_batch_tokens, self._resources.micro_batch_size)
        return cuts + [_NO_SAMPLES] * (self._engine.maximum(len(cuts)) - len(cuts))

    def infer(
        self,
        samples: Sequence[Sample],
        cuts: Sequence[IntArray] | None = None,
        *,
        keep_hidden: bool = False,
        entropy: bool = False,
        reference_of: Callable[[Sequence[Sample]], Reference] | None = None,
        routing: Routing = LIVE_ROUTING,
        log_reference: bool = False,
        start_kl: bool = False,
    ) -> Iterator[Forward]:
        """Without gradient and without dropout. `reference_of` gives what a KL is measured against;
        `log_reference` asks for pi_0's log-probabilities, `start_kl` for the KL to pi_0 as it is beside the
        policy."""
        for index_B in self.cut(samples) if cuts is None else cuts:
            part = self._part(samples, index_B)
            reference = None
            if reference_of is not None and len(index_B):
                reference = reference_of([samples[i] for i in index_B])
                reference = reference._replace(hidden_MD=part.of_tokens(reference.hidden_MD))
            start = self._start_scores(part) if log_reference or start_kl else None
            log_reference_M = None if start is None else part.tokens(start.log_prob_M)
            if start is not None and start.hidden_M is not None and start_kl:
                reference = Reference(start.hidden_M, "both", self._frozen_head)
            self._module.eval()
            with torch.no_grad(), self._routed(index_B, part, routing) as observed:
                scores = self._module(
                    *part.inputs, entropy=entropy, keep_hidden=keep_hidden, reference=reference
                )
                scores = part.scores(scores)
            yield _with_routes(Forward(index_B, part.whole, scores, log_reference_M), routing, observed, part)

    def train(
        self,
        samples: Sequence[Sample],
        cuts: Sequence[IntArray],
        routing: Routing = LIVE_ROUTING,
        *,
        log_reference: bool = False,
        announce: Announce | None = None,
    ) -> Iterator[Forward]:
        """With gradient, in training mode, one at a time. `log_reference` asks for pi_0's log-probabilities,
        `announce` says what the loss sends back, where that is known before the pass."""
        statistics = self._objective.token_factor == "eaft"
        for index_B in cuts:
            part = self._part(samples, index_B)
            reference, log_reference_M = self._reference(part, log_reference)
            self._module.train()
            announced_M = None
            if (
                announce is not None and self._sequence.size == 1
            ):  # the loss of a shared sequence is all ranks'
                announced_M = announce(index_B, part.whole)
            watching: AbstractContextManager[list[Tensor]] = nullcontext([])
            if self._balancing is not None:
                watching = self._balancing.watching()
            with self._routed(index_B, part, routing, watch=True) as observed, watching as logits:
                scores = self._engine.forward(
                    *part.inputs,
                    entropy=True,
                    statistics=statistics,
                    reference=reference,
                    announced_M=announced_M,
                )
            forward = Forward(index_B, part.whole, part.scores(scores), log_reference_M)
            if self._balancing is not None:
                whole = [part.positions(gate.flatten(0, -2)) for gate in logits]
                balance = self._balancing.loss(whole, part.whole.attention_mask_BS)
                forward = replace(forward, balance=balance)
            if observed is not None and len(index_B):
                load_L = observed.load(part.own.attention_mask_BS)
                forward = replace(forward, load_L=self._sequence.total(load_L, self._engine.device))
            yield _with_routes(forward, routing, observed, part)

    @contextmanager
    def _routed(
        self, index_B: IntArray, part: Part, routing: Routing, *, watch: bool = False
    ) -> Iterator[Recording | Replay | None]:
        """The one forward pass of a micro-batch goes in here. Recomputation in the backward pass takes the
        same routes after the context was left. `watch`: observe an MoE model whatever its routes are."""
        replayed_N = routing.replayed_N
        given_B = [] if replayed_N is None else [replayed_N[i] for i in index_B]
        if any(routes is not None for routes in given_B):
            routes_BSLK = batch_routes(given_B, part.whole.input_ids_BS.shape[1])
            with replay_routes(self._module, part.of_routes(routes_BSLK), keep_live=watch) as replay:
                yield replay if watch else None
        elif (routing.record or (watch and self._routed_model)) and len(index_B):
            with record_routes(self._module) as recording:
                yield recording
        else:
            yield None

    def _reference(self, part: Part, log_reference: bool) -> tuple[Reference | None, Tensor | None]:
        """pi_0 on this micro-batch, where it is asked for: this rank's hidden states for a KL, all log p for a
        factor or ratio."""
        direction = self._objective.kl_direction
        if direction is None and not log_reference and self._objective.token_factor != "ratio_token":
            return None, None
        scores = self._start_scores(part)
        log_reference_M = part.tokens(scores.log_prob_M)
        if direction is None or scores.hidden_M is None:
            return None, log_reference_M
        return Reference(scores.hidden_M, direction, self._frozen_head), log_reference_M

    @torch.no_grad()
    def _start_scores(self, part: Part) -> TokenScores:
        """Of the frozen copy, or of the model with its adapters off; this rank's tokens alone."""
        if self._frozen is not None:
            frozen: TokenScores = self._frozen(*part.inputs, keep_hidden=True)
            return frozen
        self._module.eval()
        with adapters_off(self._module.model):
            scores: TokenScores = self._module(*part.inputs, keep_hidden=True)
        return scores

    def _part(self, samples: Sequence[Sample], index_B: IntArray) -> Part:
        """This rank's part of a micro-batch; of a dummy for an empty one."""
        chosen, picks = (samples, index_B) if len(index_B) else ([_DUMMY], [0])
        batch = collate(chosen, picks, pad_id=0, multiple_of=self._sequence.size)
        return self._sequence.part(batch.to(self._engine.device))


def needs_reference(objective: Objective) -> bool:
    """Whether pi_0 has to be there beside the policy."""
    by_step = objective.kl_direction is not None or objective.token_factor == "ratio_token"
    return by_step or objective.delta_over_start or objective.sample_kl


def log_probs(num_samples: int, forwards: Iterator[Forward] | list[Forward]) -> FloatArray:
    """log p summed over each sample's trained tokens, [N] float64 nats."""
    log_prob_N = np.zeros(num_samples)
    for forward in forwards:
        log_prob_N[forward.index_B] = forward.by_sample(forward.scores.log_prob_M)
    return log_prob_N


def fingerprint(sample: Sample) -> bytes:
    """Same tokens, same trained positions, same routes: the same sample, wherever it was copied from."""
    digest = hashlib.sha256(np.ascontiguousarray(sample.token_ids_T, dtype=np.int32).tobytes())
    digest.update(np.packbits(sample.trained_T).tobytes())
    if sample.routes_TLK is not None:
        digest.update(np.ascontiguousarray(sample.routes_TLK).data)
    return digest.digest()


def has_routes(module: ScoringModel) -> bool:
    """Whether it is an MoE model whose routes can be seen."""
    try:
        record_routes(module)
    except ModelError:
        return False
    return True


def _with_routes(
    forward: Forward, routing: Routing, observed: Recording | Replay | None, part: Part
) -> Forward:
    if routing.record and isinstance(observed, Recording):
        return replace(forward, routes_BSLK=part.routes(observed.routes))
    return forward
