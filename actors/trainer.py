"""One data-parallel rank of the trainer: the class that a pool starts, here or as a Ray actor.

This file loads neither torch nor DeepSpeed: the driver imports it to start ranks elsewhere, and
DeepSpeed must be imported only after the rank's environment is set. The work is in `policy.py`.

Every method but the constructor is collective: all ranks are called with the same method in the
same order, each with its own samples (perhaps none); neighbours that share sequences with the same ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actors.messages import Picks, RankBeginning, RankEvaluation, RankReport
from actors.network import interface_towards
from modeseek_ray.config import Resources, Training
from modeseek_ray.errors import ConfigError
from modeseek_ray.types import FloatArray, Objective, Sample, StepPlan

if TYPE_CHECKING:
    from actors.policy import Policy
    from actors.weight_chunks import ChunkFacts, WeightChunk


@dataclass(frozen=True)
class TrainerSpec:
    """Everything a rank needs to know, the same for all ranks."""

    model_path: str  # a Hugging Face directory
    objective: Objective
    training: Training
    resources: Resources
    seed: int
    persistence_threshold: int | None = None  # ZeRO-3: smaller parameters stay whole; None = DeepSpeed's 1e5
    compare_routes: bool = False  # R3: a second scoring pass measures what live routes would have been


class TrainerRank:
    """One rank. `setup` first; then any order of the others, the same on all ranks."""

    def __init__(
        self, spec: TrainerSpec, rank: int, world_size: int, master_address: str, master_port: int
    ) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._master = (master_address, master_port)
        self._policy: Policy | None = None

    def setup(self) -> dict[str, Any]:
        """Join the other ranks and load the model. Returns what was built: parameters, device, versions.

        Raises `ConfigError` for options that exclude each other, `ModelError` for a model that
        cannot be loaded or scored.
        """
        self._prepare_environment()
        from actors.engine import leave
        from actors.policy import Policy

        try:
            self._policy = Policy(self._spec, self._rank, self._world_size)
        except BaseException:
            leave()
            raise
        return self._policy.describe()

    def remember_start(self, picks: Picks, *blocks: Sequence[Sample]) -> None:
        """Keep what exact KL to the policy as it is now needs on these samples. Before any step or load."""
        self._ready().remember_start(_samples(picks, blocks))

    def score(self, picks: Picks, *blocks: Sequence[Sample]) -> FloatArray:
        """log pi_theta summed over each sample's trained tokens, [n] nats. May keep the graph for `step`."""
        return self._ready().score(_samples(picks, blocks))

    def score_live(self, picks: Picks, *blocks: Sequence[Sample]) -> FloatArray:
        """The same with every router choosing for itself, whatever is replayed: what a loaded export computes."""
        return self._ready().score_live(_samples(picks, blocks))

    def begin(self, picks: Picks, *blocks: Sequence[Sample]) -> RankBeginning:
        """`score`, keeping here what `step` on any part of these samples is compared with, until the next `begin`.

        Raises `DataError` naming the first row that lacks what the objective needs of its sampler.
        """
        return self._ready().begin(_samples(picks, blocks))

    def score_reference(self, picks: Picks, *blocks: Sequence[Sample]) -> FloatArray:
        """log pi_0, [n] nats, from the same weights with the adapter off. Raises `ConfigError` without LoRA."""
        return self._ready().score_reference(_samples(picks, blocks))

    def step(self, picks: Picks, plan: StepPlan, *blocks: Sequence[Sample]) -> RankReport:
        """One optimizer step over the global batch. `plan.values_N` is this rank's slice of it.

        Raises `NumericsError` on every rank, before any weight changes, when the loss or a gradient
        is not finite; the rank has to be set up anew after that.
        """
        return self._ready().step(_samples(picks, blocks), plan)

    def evaluate(self, picks: Picks, kl: bool, *blocks: Sequence[Sample]) -> RankEvaluation:
        """Loss, greedy accuracy and entropy on these samples; with `kl` both KLs to the remembered start."""
        return self._ready().evaluate(_samples(picks, blocks), kl=kl)

    def distance_from_start(self) -> float:
        """Norm of theta - theta_0 over all trained parameters; with LoRA of the merged weights."""
        return self._ready().distance_from_start()

    def save(self, directory: str) -> None:
        """Write this rank's shard of the training state. Await before the next `step`."""
        self._ready().save(Path(directory))

    def load(self, directory: str) -> str | None:
        """Continue bit for bit from `save`; with another number of ranks not quite, which the sentence says.

        Another ZeRO stage or dtype is refused.
        """
        return self._ready().load(Path(directory))

    def export(self, directory: str) -> None:
        """Write a Hugging Face directory (rank 0): safetensors, configuration, tokenizer, chat template."""
        self._ready().export(Path(directory))

    def weights(self, copied_at_once: bool = False) -> Iterator[WeightChunk | ChunkFacts]:
        """Rank 0: the weights under checkpoint names, in chunks of layers; at last, on every rank, facts about them.

        LoRA is merged, out of place. Run to the end, and be done with the chunks, before the next `step`: they
        may be views of the live weights. `copied_at_once`: each is copied before the next is asked for.
        """
        yield from self._ready().weights(copied_at_once=copied_at_once)

    def canary(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]:
        """Log-probability of each token but the first, at temperature one, nats: what engines must agree with."""
        return self._ready().canary(sequences)

    def join_transfer(self, address: str, port: int, world_size: int) -> None:
        """Meet the engines in an NCCL group, as its rank 0 (trainer rank 0). They are told at the same time."""
        self._ready().transfer().join(address, port, world_size)

    def describe_transfer(self) -> dict[str, Any]:
        """Names, dtypes and shapes of what `send_weights` sends, in its order."""
        return self._ready().transfer().describe()

    def send_weights(self) -> None:
        """Broadcast all weights to the engines, which receive them at the same time."""
        self._ready().transfer().send()

    def card(self) -> str:
        """The UUID of this rank's GPU. Raises `ConfigError` where there is none."""
        from actors.cards import card

        return card()

    def lend_weights(self, layer: int, cards: Collection[str]) -> dict[str, Any] | None:
        """A layer of the weights in memory that engines on these GPUs may read; None behind the last layer.

        The engines have to have answered before the next one is lent.
        """
        return self._ready().lender().lend(layer, cards)

    def take_weights_back(self) -> None:
        """Free what was lent. Await after the engines have finished."""
        self._ready().lender().take_back()

    def free_cache(self) -> None:
        """Leave the GPU's memory that no tensor holds to whoever shares it."""
        self._ready().free_cache()

    def weights_sha256(self) -> str:
        """Hash of all parameters, gathered: the same hash means the same bits."""
        return self._ready().weights_sha256()

    def close(self) -> None:
        """Free the model and leave the group of ranks."""
        if self._policy is not None:
            self._policy.engine.close()
            self._policy = None

    def _ready(self) -> Policy:
        if self._policy is None:
            raise RuntimeError("setup() has not been called on this rank")
        return self._policy

    def _prepare_environment(self) -> None:
        """DeepSpeed and torch read these once, on import or when the process group is made."""
        resources = self._spec.resources
        on_gpu = resources.gpus_per_worker > 0
        if not on_gpu and os.environ.get("DS_ACCELERATOR", "cpu") != "cpu" and "deepspeed" in sys.modules:
            raise ConfigError(
                f"this process has loaded DeepSpeed for {os.environ['DS_ACCELERATOR']}, the job runs on the CPU.",
                param="resources.gpus_per_worker",
                mend="Start the trainer in a process of its own.",
            )
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        else:  # or cuBLAS may add up in another order each time; an operator's own choice stands
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.update(
            MASTER_ADDR=self._master[0],
            MASTER_PORT=str(self._master[1]),
            RANK=str(self._rank),
            WORLD_SIZE=str(self._world_size),
            LOCAL_RANK="0",
        )
        interface = interface_towards(self._master[0])
        if interface is not None:  # an operator's own choice stands
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(resources.cpus_per_worker))))


def _samples(picks: Picks, blocks: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [blocks[position][index] for position, index in picks]
