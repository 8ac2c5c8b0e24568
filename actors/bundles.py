"""What a job's workers reserve of a cluster, and which of them share a place. Plain Python, no Ray.

A bundle is granted whole on one node. Every worker gets one of its own; `resources.colocated` puts engine
i into trainer i's, on the same GPU: the engine sleeps while the trainer works, so that both have room
(`GeneratorSpec.sleeps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.generator import GeneratorSpec
from actors.reward_model import RewardModelSpec
from modeseek_ray.config import Resources

Bundle = dict[str, float]


@dataclass(frozen=True)
class Layout:
    """Bundles to reserve together, and the positions among them that workers of each role take."""

    bundles: list[Bundle]
    trainers: list[int]
    scorers: list[int]
    generators: list[int]
    classifiers: list[int]


def layout_of(
    resources: Resources,
    *,
    trainers: int,
    scorers: int = 0,
    generators: int = 0,
    generator: GeneratorSpec | None = None,
    classifiers: Sequence[RewardModelSpec] = (),
) -> Layout:
    """The places of a whole job. `classifiers` has one entry a worker.

    >>> layout_of(Resources(gpus_per_worker=1.0), trainers=2, scorers=1).bundles
    [{'CPU': 1.0, 'GPU': 1.0}, {'CPU': 1.0, 'GPU': 1.0}, {'CPU': 1.0, 'GPU': 1.0}]
    """
    own = bundle_of(resources.cpus_per_worker, resources.gpus_per_worker)
    bundles = [dict(own) for _ in range(trainers + scorers)]
    of_generators: list[int] = []
    if generator is not None:
        wanted = bundle_of(generator.cpus_per_worker, generator.gpus_per_worker * generator.tensor_parallel)
        for i in range(generators):
            if resources.colocated and i < trainers:
                for name, amount in wanted.items():
                    bundles[i][name] = bundles[i].get(name, 0.0) + amount
                of_generators.append(i)
            else:
                of_generators.append(len(bundles))
                bundles.append(wanted)
    first = len(bundles)
    bundles += [bundle_of(spec.cpus_per_worker, spec.gpus_per_worker) for spec in classifiers]
    return Layout(
        bundles,
        trainers=list(range(trainers)),
        scorers=list(range(trainers, trainers + scorers)),
        generators=of_generators,
        classifiers=list(range(first, len(bundles))),
    )


def bundle_of(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
