"""Scoring on Ray, by one actor or several: the same bits for any number, deaths and held CPUs survived."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import scoring
from actors.reference import ScoringSpec
from actors.scoring import BlockScorer, cut, score_dataset
from modeseek_ray.errors import ModelError, WorkerError
from modeseek_ray.types import FloatArray, Sample


@pytest.fixture(scope="module")
def dataset() -> list[Sample]:
    """A hundred samples of 3 to 30 tokens."""
    rng = np.random.default_rng(0)
    samples = []
    for row in range(100):
        length = int(rng.integers(3, 31))
        token_ids_T = rng.integers(5, 200, length).astype(np.int32)
        samples.append(Sample(row=row, token_ids_T=token_ids_T, trained_T=np.arange(length) >= length // 2))
    return samples


@pytest.fixture(scope="module")
def spec(tiny_moe: Path) -> ScoringSpec:
    return ScoringSpec(str(tiny_moe), micro_batch_tokens=64)


def run(samples: list[Sample], spec: ScoringSpec, **options: Any) -> FloatArray:
    defaults = {"num_scorers": 1, "on_ray": True, "deadline_s": 240.0, "cache_dir": None}
    return asyncio.run(score_dataset(samples, spec, **{**defaults, **options}))


@pytest.fixture(scope="module")
def here_N(dataset: list[Sample], spec: ScoringSpec) -> FloatArray:
    """Scored in this process."""
    return run(dataset, spec, on_ray=False)


@pytest.mark.parametrize("num_scorers", [1, 4])
def test_any_number_of_scorers_gives_the_same_bits(
    ray_cluster: Any,
    dataset: list[Sample],
    spec: ScoringSpec,
    here_N: FloatArray,
    num_scorers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if num_scorers == 1:  # it needs nobody to hand out its blocks
        monkeypatch.setattr(scoring, "_by_ray_data", None)
    assert len(cut(dataset, spec.micro_batch_tokens)) >= 4
    free = ray_cluster.available_resources()["CPU"]  # engines that all tests share hold theirs
    np.testing.assert_array_equal(run(dataset, spec, num_scorers=num_scorers), here_N)
    wait_for_free_cpus(ray_cluster, free)  # trainers are placed next


def wait_for_free_cpus(ray: Any, count: float, deadline_s: float = 60.0) -> None:
    ends = time.monotonic() + deadline_s
    while ray.available_resources().get("CPU", 0) < count:
        assert time.monotonic() < ends, f"scorers still hold CPUs: {ray.available_resources()}"
        time.sleep(0.2)


class DiesOnce(BlockScorer):
    """Ends its process at the first block any scorer gets, as an out-of-memory kill would."""

    def __init__(self, spec: ScoringSpec, marker: str) -> None:
        super().__init__(spec)
        self._marker = Path(marker)

    def __call__(self, block: pa.Table) -> pa.Table:
        if not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        return super().__call__(block)


@pytest.mark.parametrize("num_scorers", [1, 2])
def test_a_scorer_that_died_has_its_block_computed_again(
    ray_cluster: Any,
    dataset: list[Sample],
    spec: ScoringSpec,
    here_N: FloatArray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_scorers: int,
) -> None:
    marker = tmp_path / "died"

    class Dying(DiesOnce):
        def __init__(self, spec: ScoringSpec) -> None:
            super().__init__(spec, str(marker))

    monkeypatch.setattr(scoring, "BlockScorer", Dying)
    np.testing.assert_array_equal(run(dataset, spec, num_scorers=num_scorers), here_N)
    assert marker.exists()


def test_held_cpus_end_in_an_error_that_says_so(
    ray_cluster: Any, dataset: list[Sample], spec: ScoringSpec
) -> None:
    hungry = ScoringSpec(spec.model_path, micro_batch_tokens=64, cpus_per_worker=1000.0)
    with pytest.raises(WorkerError, match="Other actors may hold the CPUs"):
        run(dataset, hungry, stall_s=5.0)


def test_a_scorers_own_error_comes_back_as_it_was_raised(
    ray_cluster: Any, dataset: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        run(dataset, ScoringSpec(str(tmp_path)))
