"""The forward passes of scoring and of steps: with whose routes, and with which graphs.

A scoring pass may keep its graphs for a step on the same samples. On ZeRO-3 several forward passes
before a backward pass give silently wrong gradients, so there a graph is kept only if the whole step is
one micro-batch. Kept or not, a step computes the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.begun import Past, require
from actors.engine import ZeroEngine
from actors.forward import LIVE_ROUTING, Announce, Forward, ForwardPasses, Routing, fingerprint
from modeseek_ray.errors import ConfigError
from modeseek_ray.types import Sample

if TYPE_CHECKING:
    from actors.trainer import TrainerSpec


@dataclass
class _Kept:
    """A scoring pass whose graphs wait for the step on the same samples."""

    fingerprints: list[bytes]
    forwards: list[Forward]


class StepPasses:
    """One rank's. Everything but `let_go` is collective."""

    def __init__(
        self, passes: ForwardPasses, engine: ZeroEngine, spec: TrainerSpec, *, keeps_graphs: bool
    ) -> None:
        """`keeps_graphs` is False where no step is what was scored: a model with dropout, steps on parts."""
        self._passes = passes
        self._zero_stage = engine.zero_stage
        self._replay = spec.objective.routing_replay
        self._choice = spec.resources.keep_graph if keeps_graphs else "never"
        self._kept: _Kept | None = None

    def let_go(self) -> None:
        """Free the graphs that are kept: nobody will step on them."""
        self._kept = None

    def scoring(
        self, samples: Sequence[Sample], *, record: bool = False, log_reference: bool = False
    ) -> Iterator[Forward]:
        """Micro-batch by micro-batch, under the sampler's routes (R3) or under live ones, recorded if asked.

        With gradient, and kept for `of_step`, where that is exact. Run through all of it. `log_reference` asks
        for pi_0's log-probabilities.
        """
        self._kept = None
        routing = Routing(record=True) if record else self._sampler_routing(samples)
        cuts = self._passes.cut(samples)
        live_in_r2 = self._replay == "R2" and not record  # its steps ask what `begin` recorded, not this
        if live_in_r2 or not self._keeps_graph(len(cuts)):
            yield from self._passes.infer(samples, cuts, routing=routing, log_reference=log_reference)
            return
        kept = _Kept([fingerprint(s) for s in samples], [])
        for forward in self._passes.train(samples, cuts, routing, log_reference=log_reference):
            kept.forwards.append(forward)
            yield forward
        self._kept = kept

    def under_start_routes(self, samples: Sequence[Sample]) -> Iterator[Forward]:
        """R0: without gradient, under the experts that pi_0 asks. Replay rows, outside of ratios, may go live."""
        self._kept = None
        require(samples, "start_routes_TLK", "routes of the start, which `routing_replay: R0` replays")
        return self._passes.infer(samples, routing=Routing([s.start_routes_TLK for s in samples]))

    def of_step(
        self, samples: Sequence[Sample], past_N: Sequence[Past] | None, announce: Announce
    ) -> tuple[int, Iterator[Forward]]:
        """How many micro-batches, and their passes: the kept ones if they are of these samples.

        R3 asks the sampler's experts, R2 those recorded in `past_N`; otherwise, R0 included, they are live.
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept.fingerprints == [fingerprint(s) for s in samples]:
            return len(kept.forwards), _drain(kept.forwards)
        del kept  # other samples' graphs, before new ones are built
        routing = self._sampler_routing(samples)
        if self._replay == "R2" and past_N is not None:
            routing = Routing([past.routes_TLK for past in past_N])
        cuts = self._passes.cut(samples)
        return len(cuts), self._passes.train(samples, cuts, routing, announce=announce)

    def _sampler_routing(self, samples: Sequence[Sample]) -> Routing:
        if self._replay != "R3":
            return LIVE_ROUTING
        require(samples, "routes_TLK", "routes of its sampler, which `routing_replay: R3` replays")
        return Routing([s.routes_TLK for s in samples])

    def _keeps_graph(self, num_micro_batches: int) -> bool:
        """`num_micro_batches` is the same on all ranks, so all decide alike."""
        exact = self._zero_stage <= 2 or num_micro_batches == 1
        if self._choice == "always" and not exact:
            raise ConfigError(
                f"ZeRO-3 cannot keep the graphs of {num_micro_batches} micro-batches:"
                " several forward passes before a backward pass give wrong gradients there.",
                param="resources.keep_graph",
                mend='Use "auto", a lower zero_stage, or a larger micro_batch_tokens.',
            )
        return self._choice != "never" and exact


def _drain(forwards: list[Forward]) -> Iterator[Forward]:
    """One after the other, letting go of each, so that a graph is freed once it was used."""
    while forwards:
        yield forwards.pop(0)
