"""Ray: where actors are placed and started. The only place that applies `ray.remote`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.bundles import layout_of
from actors.environments import generator_environment, scorer_environment, trainer_environment
from actors.generator import GeneratorEngine, GeneratorSpec
from actors.generator_pool import GeneratorPool
from actors.network import free_port
from actors.nodes import Shared, look, refuse_blind
from actors.pools import TrainerPool
from actors.reference import ReferenceModel, ScoringSpec
from actors.reward_model import ClassifierPool, RewardModel, RewardModelSpec
from actors.scorers import ScorerPool
from actors.trainer import TrainerRank
from modeseek_ray.data.batching import deal
from modeseek_ray.errors import (
    ModeseekError,
    StorageError,
    WorkerError,
    is_full,
    is_out_of_memory,
    out_of_memory,
)

if TYPE_CHECKING:
    from actors.trainer import TrainerSpec
    from modeseek_ray.config import Resources

log = logging.getLogger(__name__)

PLACEMENT_DEADLINE_S = 300.0
NODE_DEADLINE_S = 60.0  # to say what it sees, its first worker process included
Seat = tuple[PlacementGroup, int]  # a bundle that is reserved, and no actor in it


class RayWorker:
    """A Ray actor behind `call`. Its own errors come back as they were raised."""

    copies_stream = True  # into the object store, between two steps of the generator

    def __init__(self, handle: Any, name: str) -> None:
        self._handle = handle
        self._name = name

    async def call(self, method: str, *args: Any) -> Any:
        return await self._answer(getattr(self._handle, method).remote(*args), method)

    async def _answer(self, reference: Any, method: str) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, ModeseekError):
                raise error.cause from None
            if is_full(error.cause):
                raise StorageError(
                    f"{self._name} cannot write in {method}: {error.cause}.",
                    mend="Free some space, then resume the job: it goes on from its last checkpoint.",
                    code="disk_full",
                ) from error
            if is_out_of_memory(error.cause):
                raise out_of_memory(f"{self._name} failed in {method}", error.cause) from error
            raise WorkerError(
                f"{self._name} failed in {method}: {error.cause!r}",
                mend="The full traceback is in the job's log.",
            ) from error
        except (RayActorError, OutOfMemoryError) as error:
            if is_out_of_memory(error):  # Ray's memory monitor says so; the kernel's kills without a word
                raise out_of_memory(f"{self._name} was killed in {method}", error) from error
            raise WorkerError(
                f"{self._name} died in {method}: {error}",
                mend="Look for an out-of-memory kill on its node; the job can go on from its last checkpoint.",
                code="worker_died",
            ) from error

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """A reference to each thing `method` yields; what it raises is raised where a reference is awaited."""
        references = getattr(self._handle, method).options(num_returns="streaming").remote(*args)
        async for reference in references:
            yield reference

    async def fetch(self, reference: Any) -> Any:
        """What a streamed reference stands for, brought here. Raises what `call` would."""
        return await self._answer(reference, "stream")

    async def stop(self) -> None:
        ray.kill(self._handle, no_restart=True)


class RayPlacement:
    """Places a job's workers on the cluster this process is connected to, and frees them again."""

    on_ray = True

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._groups: list[PlacementGroup] = []
        self._trainer_seats: list[Seat] = []
        self._rank_0: Seat | None = None
        self._generator_seats: list[Seat] = []
        self._classifier_seats: list[Seat] = []
        self._scorer_seats: list[Seat] = []

    async def reserve(
        self,
        *,
        trainers: int,
        generators: int = 0,
        generator: GeneratorSpec | None = None,
        classifiers: Sequence[RewardModelSpec] = (),
        scorers: int = 0,
    ) -> None:
        """Room for all workers of a job at once, before the first of them starts.

        One placement group: it is granted whole or not at all. Two jobs that reserved their trainers
        and then waited for the other's CPUs to start generators would wait for ever. `classifiers` has
        one entry a worker.
        """
        layout = layout_of(
            self._resources,
            trainers=trainers,
            scorers=scorers,
            generators=generators,
            generator=generator,
            classifiers=classifiers,
        )
        group = await self._reserve(layout.bundles)
        self._trainer_seats = [(group, index) for index in layout.trainers]
        self._scorer_seats = [(group, index) for index in layout.scorers]
        self._generator_seats = [(group, index) for index in layout.generators]
        self._classifier_seats = [(group, index) for index in layout.classifiers]

    def put(self, block: Any) -> Any:
        return ray.put(block)

    async def trainers(self, spec: TrainerSpec, count: int) -> TrainerPool:
        """All ranks or none: a placement group reserves every bundle before the first actor starts."""
        if len(self._trainer_seats) < count:
            await self.reserve(trainers=count)
        seats, self._trainer_seats = self._trainer_seats[:count], self._trainer_seats[count:]
        remote_rank = ray.remote(TrainerRank)
        nodes = _nodes_of(seats)
        if spec.resources.sequence_parallel > 1:
            # Neighbours exchange heads in every layer: on one node, if it can be.
            seats = [seat for _, seat in sorted(zip(nodes, seats, strict=True), key=lambda pair: pair[0])]
            nodes = sorted(nodes)
        self._rank_0 = seats[0]
        address, port = await self.meeting()
        ranks = [
            RayWorker(
                remote_rank.options(  # type: ignore[attr-defined]
                    num_cpus=self._resources.cpus_per_worker,
                    num_gpus=self._resources.gpus_per_worker,
                    scheduling_strategy=_in(seats[rank]),
                    # A step is not idempotent: a rank that died ends the attempt, never a silent redo.
                    max_restarts=0,
                    max_task_retries=0,
                    runtime_env={"env_vars": trainer_environment(self._resources)},
                ).remote(spec, rank, count, address, port),
                f"trainer rank {rank} on {nodes[rank]}",
            )
            for rank in range(count)
        ]
        return TrainerPool(ranks, deal, spec.resources.sequence_parallel)

    async def meeting(self) -> tuple[str, int]:
        """Where processes can meet rank 0: its node's address, and a port that is free there."""
        if self._rank_0 is None:
            raise RuntimeError("place the trainers first")
        place = ray.remote(free_address).options(num_cpus=0, scheduling_strategy=_in(self._rank_0))
        found: tuple[str, int] = await asyncio.wait_for(place.remote(), PLACEMENT_DEADLINE_S)
        return found

    async def generators(self, spec: GeneratorSpec, count: int) -> GeneratorPool:
        """Engines in the places `reserve` took for them. One that dies is started again in its place."""
        if len(self._generator_seats) < count:
            raise RuntimeError("reserve() places for trainers and generators together first")
        seats, self._generator_seats = self._generator_seats[:count], self._generator_seats[count:]
        spec = replace(spec, exit_when_broken=True)
        remote_engine = ray.remote(GeneratorEngine)

        async def start(index: int) -> RayWorker:
            handle = remote_engine.options(  # type: ignore[attr-defined]
                num_cpus=spec.cpus_per_worker,
                num_gpus=spec.gpus_per_worker * spec.tensor_parallel,
                scheduling_strategy=_in(seats[index]),
                # Its pool starts another, brings it to the weights' version and asks again.
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": generator_environment(spec)},
            ).remote(spec)
            return RayWorker(handle, f"generator {index}")

        # In memory the weights wait for a new engine; vLLM's own ways hand them over once, to who is there.
        options = {} if spec.transfer == "chunks" else {"max_replacements": 0}
        return GeneratorPool(spec, start, count, **options)

    async def classifiers(self, specs: Sequence[RewardModelSpec], count: int) -> ClassifierPool:
        """`count` workers of each model, in the places `reserve` took for them, models in the same order."""
        if len(self._classifier_seats) < len(specs) * count:
            raise RuntimeError("reserve() places for all workers of the job together first")
        seats = iter(self._classifier_seats)
        remote_model = ray.remote(RewardModel)

        def start(spec: RewardModelSpec, index: int) -> RayWorker:
            handle = remote_model.options(  # type: ignore[attr-defined]
                num_cpus=spec.cpus_per_worker,
                num_gpus=spec.gpus_per_worker,
                scheduling_strategy=_in(next(seats)),
                # Scoring changes nothing: Ray may start a worker that died again, and ask it again.
                max_restarts=3,
                max_task_retries=3,
                runtime_env={"env_vars": scorer_environment(spec.num_threads)},
            ).remote(spec)
            return RayWorker(handle, f"classifier {index} of {spec.model_path}")

        workers = {spec.key: [start(spec, index) for index in range(count)] for spec in specs}
        self._classifier_seats = list(seats)
        return ClassifierPool(workers)

    async def scorers(self, spec: ScoringSpec, count: int) -> ScorerPool:
        """Frozen models in the places `reserve` took for them, to score samples as they come."""
        if len(self._scorer_seats) < count:
            raise RuntimeError("reserve() places for trainers and scorers together first")
        seats, self._scorer_seats = self._scorer_seats[:count], self._scorer_seats[count:]
        remote_model = ray.remote(ReferenceModel)
        workers = [
            RayWorker(
                remote_model.options(  # type: ignore[attr-defined]
                    num_cpus=spec.cpus_per_worker,
                    num_gpus=spec.gpus_per_worker,
                    scheduling_strategy=_in(seat),
                    # The weights never change, so a call may be made again on a new process.
                    max_restarts=3,
                    max_task_retries=3,
                    runtime_env={"env_vars": trainer_environment(self._resources)},
                ).remote(spec),
                f"scorer {index}",
            )
            for index, seat in enumerate(seats)
        ]
        return ScorerPool(workers, spec.micro_batch_tokens, with_routes=spec.with_routes)

    async def close(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()
        self._trainer_seats, self._scorer_seats = [], []
        self._generator_seats, self._classifier_seats = [], []

    async def _reserve(self, bundles: Sequence[dict[str, float]]) -> PlacementGroup:
        group = placement_group(list(bundles), strategy=self._resources.placement.upper())
        self._groups.append(group)
        try:
            await asyncio.wait_for(group.ready(), PLACEMENT_DEADLINE_S)
        except TimeoutError:
            raise WorkerError(
                f"the cluster did not free {_total(bundles)} for {len(bundles)} workers"
                f" within {PLACEMENT_DEADLINE_S:.0f} s;"
                f" it has {ray.cluster_resources()}, free are {ray.available_resources()}.",
                mend="Ask for fewer resources.trainers or generators, or add nodes.",
                code="no_resources",
            ) from None
        return group


async def check_nodes(shared: Shared) -> None:
    """Ask every node that could be given a worker what it sees. Raises `StorageError` naming those that are blind.

    A node that does not answer is left to Ray, which finds out by itself whether it is lost.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if len(nodes) < 2 and any(node["NodeID"] == ray.get_runtime_context().get_node_id() for node in nodes):
        return
    remote_look = ray.remote(look)

    async def ask(node_id: str) -> str | None:
        task = remote_look.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(shared)
        try:
            answer: str | None = await asyncio.wait_for(_result(task), NODE_DEADLINE_S)
        except (TimeoutError, RayError) as error:
            log.warning("node %s did not say what it sees: %r", node_id, error)
            return None
        return answer

    answers = await asyncio.gather(*(ask(node["NodeID"]) for node in nodes))
    refuse_blind(dict(zip(_names(nodes), answers, strict=True)))


async def _result(reference: Any) -> Any:
    return await reference


def _names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Addresses; where several nodes share one, with the beginning of their ids."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return [
        address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:8]})"
        for node, address in zip(nodes, addresses, strict=True)
    ]


def _nodes_of(seats: Sequence[Seat]) -> list[str]:
    """The address of each seat's node."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group, _ in seats}
    return [addresses.get(tables[group.id].get(index), "a lost node") for group, index in seats]


def free_address() -> tuple[str, int]:
    """This node's address and a free port on it: where rank 0 will listen. Runs on rank 0's bundle."""
    return ray.util.get_node_ip_address(), free_port()


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Join the cluster a Ray job runs in, or a given address; otherwise start one that ends with us."""
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    if address or os.environ.get("RAY_ADDRESS"):
        common.pop("include_dashboard")
        ray.init(address=address or "auto", **common)
    else:
        # Logical CPUs: a laptop's two cores hold more small workers than that, only slower.
        ray.init(num_cpus=num_cpus or max(8, os.cpu_count() or 1), **common)


def _total(bundles: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for bundle in bundles for name in bundle})
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _in(seat: Seat) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(seat[0], placement_group_bundle_index=seat[1])
