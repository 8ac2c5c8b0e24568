"""The frozen scorer, and scoring a data set with it in this process: values, cuts, cache, errors."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors import scoring
from actors.reference import ReferenceModel, ScoringSpec
from actors.scoring import cache_key, cut, score_dataset
from modeseek_ray.errors import ModelError, NumericsError, WorkerError
from modeseek_ray.types import FloatArray, Sample


@pytest.fixture(scope="module")
def dataset() -> list[Sample]:
    """Forty samples of 3 to 30 tokens, the second half of each trained on."""
    rng = np.random.default_rng(0)
    samples = []
    for row in range(40):
        length = int(rng.integers(3, 31))
        token_ids_T = rng.integers(5, 200, length).astype(np.int32)
        samples.append(Sample(row=row, token_ids_T=token_ids_T, trained_T=np.arange(length) >= length // 2))
    return samples


@pytest.fixture
def spec(tiny_moe: Path) -> ScoringSpec:
    return ScoringSpec(str(tiny_moe), micro_batch_tokens=64)


def run(
    samples: list[Sample], spec: ScoringSpec, cache_dir: Path | None = None, **options: Any
) -> FloatArray:
    defaults = {"num_scorers": 1, "on_ray": False, "deadline_s": 60.0}
    return asyncio.run(score_dataset(samples, spec, cache_dir=cache_dir, **{**defaults, **options}))


def expected_log_probs(model_path: str, samples: list[Sample]) -> FloatArray:
    """One unpadded sequence at a time through transformers alone, summed in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    sums = []
    for sample in samples:
        ids_T = torch.from_numpy(sample.token_ids_T).long()
        with torch.no_grad():
            log_prob_TV = model(input_ids=ids_T[None]).logits[0].double().log_softmax(-1)
        log_prob_T = log_prob_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)
        sums.append(float(log_prob_T[torch.from_numpy(sample.trained_T[1:])].sum()))
    return np.array(sums)


def test_scores_are_those_of_transformers(spec: ScoringSpec, dataset: list[Sample]) -> None:
    expected_N = expected_log_probs(spec.model_path, dataset)
    np.testing.assert_allclose(run(dataset, spec), expected_N, rtol=0, atol=1e-4)
    model = ReferenceModel(spec)
    picks = [(1, 3), (0, 0), (1, 3)]
    found_N = model.score(picks, [dataset[7]], dataset)
    np.testing.assert_allclose(found_N, expected_N[[3, 7, 3]], rtol=0, atol=1e-4)
    tokens = model.score_tokens(picks, [dataset[7]], dataset)
    assert [len(t) for t in tokens] == [dataset[i].num_tokens for i in (3, 7, 3)]
    assert [t.sum() for t in tokens] == pytest.approx(found_N.tolist(), abs=1e-12)


def test_temperature_divides_the_logits(spec: ScoringSpec, dataset: list[Sample]) -> None:
    hot = ScoringSpec(spec.model_path, temperature=1e6, micro_batch_tokens=64)
    # At an infinite temperature every one of the 261 tokens is equally likely.
    expected_N = -np.log(261) * np.array([s.num_tokens for s in dataset])
    np.testing.assert_allclose(run(dataset, hot), expected_N, rtol=1e-4)


def test_bfloat16_scores_are_near(spec: ScoringSpec, dataset: list[Sample]) -> None:
    half = ScoringSpec(spec.model_path, dtype="bfloat16", micro_batch_tokens=64)
    per_token_N = (run(dataset, half) - run(dataset, spec)) / [s.num_tokens for s in dataset]
    assert 0 < np.abs(per_token_N).max() < 0.01


def test_blocks_depend_on_the_samples_alone(dataset: list[Sample]) -> None:
    blocks = cut(dataset, 64)
    assert [b["index"].to_pylist() for b in blocks] == [b["index"].to_pylist() for b in cut(dataset, 64)]
    assert sorted(i for b in blocks for i in b["index"].to_pylist()) == list(range(40))
    for block in blocks:
        lengths = [len(ids) for ids in block["token_ids"]]
        micro_batches = block["micro_batch"].to_pylist()
        for m in set(micro_batches):
            inside = [n for n, of in zip(lengths, micro_batches, strict=True) if of == m]
            assert max(inside) * len(inside) <= 64


def test_the_cache_is_read_and_survives_damage(
    spec: ScoringSpec, dataset: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_N = run(dataset, spec, tmp_path)
    (file,) = tmp_path.iterdir()
    assert pq.read_table(file)["num_tokens"].to_pylist() == [s.num_tokens for s in dataset]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "BlockScorer", None)  # nothing can be computed: it must come from the file
        np.testing.assert_array_equal(run(dataset, spec, tmp_path), first_N)
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(run(dataset, spec, tmp_path), first_N)
    assert pq.read_table(file).num_rows == 40 and list(tmp_path.iterdir()) == [file]


def test_the_key_changes_with_whatever_changes_the_scores(
    spec: ScoringSpec, dataset: list[Sample], tmp_path: Path
) -> None:
    path = spec.model_path
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    same = ScoringSpec(str(copy), micro_batch_tokens=64, cpus_per_worker=1.5)
    assert cache_key(dataset, same) == cache_key(dataset, spec)  # elsewhere, and still one thread

    longer = Sample(row=0, token_ids_T=dataset[0].token_ids_T, trained_T=np.arange(dataset[0].length) > 0)
    other_token = dataset[0].token_ids_T.copy()
    other_token[-1] += 1
    changed = Sample(row=0, token_ids_T=other_token, trained_T=dataset[0].trained_T)
    keys = [
        cache_key(dataset, spec),
        cache_key(dataset[1:], spec),
        cache_key(dataset[::-1], spec),
        cache_key([longer, *dataset[1:]], spec),
        cache_key([changed, *dataset[1:]], spec),
        cache_key(dataset, ScoringSpec(path, micro_batch_tokens=65)),
        cache_key(dataset, ScoringSpec(path, micro_batch_tokens=64, dtype="bfloat16")),
        cache_key(dataset, ScoringSpec(path, micro_batch_tokens=64, temperature=0.5)),
        cache_key(dataset, ScoringSpec(path, micro_batch_tokens=64, cpus_per_worker=2)),
    ]
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(copy)
    keys.append(cache_key(dataset, same))
    assert len(set(keys)) == len(keys)


def test_progress_ends_at_the_whole(spec: ScoringSpec, dataset: list[Sample]) -> None:
    seen: list[tuple[int, int]] = []
    run(dataset, spec, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(cut(dataset, 64)) and seen == sorted(seen) and seen[-1] == (40, 40)


def test_no_samples(spec: ScoringSpec) -> None:
    assert run([], spec).shape == (0,)


def test_deadline_is_kept(spec: ScoringSpec, dataset: list[Sample]) -> None:
    with pytest.raises(WorkerError, match="0 of .* blocks were done") as caught:
        run(dataset, spec, deadline_s=0.0)
    assert caught.value.code == "scoring_deadline"
    for thread in threading.enumerate():  # given up, not ended: it must not load a model beside other tests
        if thread.name == "scoring":
            thread.join()


def test_errors_of_the_scorer_come_through(dataset: list[Sample], tmp_path: Path, spec: ScoringSpec) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        run(dataset, ScoringSpec(str(tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(spec.model_path)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NumericsError, match="not finite"):
        run(dataset[:3], ScoringSpec(str(tmp_path / "nan")))
