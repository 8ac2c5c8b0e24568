"""One weighted ZeRO-2 job, on one node and spread over two, in one process that is connected to a cluster.

    python -m tests.nodes.loss_curves MODEL DIRECTORY [--whole]

Prints one JSON object: by placement, the losses, the weights' hash, the nodes of the ranks and those of the scorers.
Without `--whole` no scorers are started: reference scores are made up, and the export is not loaded again.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray

from actors import scoring
from actors.attempt import Attempt
from actors.attempt_spec import AttemptSpec
from actors.cluster import RayPlacement, connect
from actors.journal import CallbackSink, ResultJournal
from actors.reference import ScoringSpec
from actors.scoring import BlockScorer
from modeseek_ray.config import parse_config
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.reports.results import read_job, read_metrics

WEIGHTED = {
    "likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": {"ess": {"floor": 0.5}}}
}
TRAINING = {
    "max_steps": 4,
    "batch_size": 6,
    "learning_rate": 0.01,
    "evaluate_every": 4,
    "checkpoint_every": 2,
}


class Brief(Attempt):
    """Trainers are its only workers."""

    async def _score(self, dataset: Dataset) -> Dataset:
        tokens_N = np.array([sample.num_tokens for sample in dataset.samples])
        spread_N = np.random.default_rng(0).normal(size=len(tokens_N))
        return dataset.with_columns(log_reference_N=-np.log(261) * tokens_N + spread_N)

    async def _check_export(self, exported: Any) -> None:
        """Left out."""


class Watched(RayPlacement):
    """Remembers where the ranks were placed, by what a rank's handle is called."""

    nodes: list[str]

    async def trainers(self, *args: Any) -> Any:
        pool = await super().trainers(*args)
        self.nodes = [rank._name.rpartition(" ")[2] for rank in pool._ranks]
        return pool


def remembering(directory: Path, model: Path) -> type[BlockScorer]:
    """Scorers of this model leave the name of their node, whether or not they are in time for a block."""

    class Seen(BlockScorer):
        def __init__(self, spec: ScoringSpec) -> None:
            if spec.model_path == str(model):  # not of its export
                (directory / ray.get_runtime_context().get_node_id()).touch()
            super().__init__(spec)

    return Seen


def rows(directory: Path) -> Path:
    path = directory / "train.jsonl"
    lines = [
        {"prompt": f"say {c}", "completion": " " + c * (1 + j % 5)} for j, c in enumerate("abcdefghijkl")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(model: Path, data: Path, out: Path, placement: str, attempt: type[Attempt]) -> dict[str, Any]:
    config = parse_config(
        {
            "model": str(model),
            "training_file": str(data),
            "method": {"type": "weighted", "weighted": {**WEIGHTED, "training": TRAINING}},
            # Micro-batches of a sample or two: blocks for both scorers.
            "resources": {
                "trainers": 2,
                "zero_stage": 2,
                "scorers": 2,
                "placement": placement,
                "micro_batch_tokens": 24,
            },
        }
    )
    spec = AttemptSpec(placement, 1, config, {"training_file": data}, model, out, data.parent / "cache")
    watched = Watched(config.resources)
    seats = out / "scorers"
    seats.mkdir(parents=True)
    with mock.patch.object(scoring, "BlockScorer", remembering(seats, model)):
        asyncio.run(
            attempt(spec, watched, ResultJournal(out / "results", CallbackSink(lambda _: None))).run()
        )
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return {
        "losses": read_metrics(out / "results").known("loss")[1].tolist(),
        "sha256": read_job(out / "results").weights_sha256,
        "nodes": watched.nodes,
        "scorers": sorted(addresses[path.name] for path in seats.iterdir()),
    }


def main(model: Path, directory: Path, *, whole: bool) -> None:
    connect()
    data = rows(directory)
    found = {
        name: run(model, data, directory / name, name, Attempt if whole else Brief)
        for name in ("pack", "spread")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), whole="--whole" in sys.argv)
