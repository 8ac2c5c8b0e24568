"""Options of a job, each through a whole attempt, on a dense and on a mixture-of-experts model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.attempt import Attempt
from actors.attempt_spec import AttemptResult, AttemptSpec
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement
from modeseek_ray.config import parse_config
from modeseek_ray.reports.results import Metrics, read_metrics

TRAINING = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "evaluate_every": 3, "checkpoint_every": 6}
ANCHORED = {
    "likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": {"ess": {"floor": 0.5}}}
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("data")
    rows = {
        "training_file": [
            {"prompt": f"say {c}", "completion": c * (1 + j % 5)} for j, c in enumerate("abcdefghijkl")
        ],
        "retention_file": [{"prompt": f"{c} then", "completion": f" {c}{c}", "accept": []} for c in "wxyz"],
        "replay_file": [{"prompt": f"{c} then", "completion": f" {c}{c}"} for c in "mnopqrst"],
    }
    for role, records in rows.items():
        (directory / role).with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return {role: directory / f"{role}.jsonl" for role in rows}


def _run(
    model: Path,
    files: Mapping[str, Path],
    out: Path,
    weighting: Any = None,
    training: Any = None,
    **more: Any,
) -> tuple[AttemptResult, Metrics]:
    behavior = more.pop("behavior_model", None)
    roles = (
        "training_file",
        "retention_file",
        *(("replay_file",) if "replay_share" in (training or {}) else ()),
    )
    config = parse_config(
        {
            "model": str(model),
            **{role: str(files[role]) for role in roles},
            **({} if behavior is None else {"behavior_model": str(behavior)}),
            "method": {
                "type": "weighted",
                "weighted": {**(weighting or {}), "training": {**TRAINING, **(training or {})}},
            },
            "resources": more,
        }
    )
    chosen = {role: files[role] for role in roles}
    spec = AttemptSpec("job", 1, config, chosen, model, out, out / "cache", behavior)
    journal = ResultJournal(out / "results", CallbackSink(lambda event: None))
    result = asyncio.run(Attempt(spec, LocalPlacement(), journal).run())
    return result, read_metrics(out / "results")


@pytest.fixture(params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tiny_dense: Path, tiny_moe: Path) -> Path:
    return {"dense": tiny_dense, "moe": tiny_moe}[request.param]


@pytest.mark.parametrize(
    "resources",
    [
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 0, "micro_batch_size": 1},
    ],
    ids=["zero3-checkpointing", "zero1-offload", "zero0-micro1"],
)
def test_layouts_learn_the_same(
    model: Path, files: dict[str, Path], tmp_path: Path, resources: dict[str, Any]
) -> None:
    """Where a parameter lies and when an activation is computed changes rounding, not the job."""
    _, plain = _run(model, files, tmp_path / "plain", ANCHORED)
    _, other = _run(model, files, tmp_path / "other", ANCHORED, **resources)
    assert other.known("loss")[1] == pytest.approx(plain.known("loss")[1], rel=1e-4)


def test_bfloat16_follows_float32(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    _, full = _run(model, files, tmp_path / "full")
    _, half = _run(model, files, tmp_path / "half", dtype="bfloat16")
    assert half.known("loss")[1] == pytest.approx(full.known("loss")[1], rel=0.05)
    assert half.last("nll") < half.first("nll")


def test_lora_trains_adapters_alone_and_exports_both(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    experts = "moe" in model.name
    lora = {"rank": 4, "target_experts": experts}
    result, metrics = _run(model, files, tmp_path, ANCHORED, {"lora": lora, "learning_rate": 0.02})
    assert result.model_path is not None
    assert (result.model_path / "model.safetensors").is_file()
    assert (result.model_path / "adapter" / "adapter_model.safetensors").is_file()
    assert metrics.last("nll") < metrics.first("nll")


def test_a_checkpoint_stands_for_the_data(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """mu-hat = the start itself: the ratio to the data is then the ratio to the start."""
    weighting = {"likelihood": {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.5}}
    same = {"likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.5}}
    _, by_data = _run(model, files, tmp_path / "data", weighting, behavior_model=model)
    _, by_start = _run(model, files, tmp_path / "start", same)
    # The first step of a ratio to the start is held at gamma 0 (noise floor); there both weigh alike.
    assert by_data.known("loss")[1][0] == pytest.approx(by_start.known("loss")[1][0], rel=1e-5)
    assert by_data.last("gamma") == 0.5


def test_replay_rows_are_mixed_in_at_their_share(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    _run(model, files, tmp_path, ANCHORED, {"replay_share": 0.25})
    ledger = pq.read_table(tmp_path / "results" / "weights.parquet").to_pydict()
    replayed = [w for w, is_replay in zip(ledger["weight"], ledger["is_replay"], strict=True) if is_replay]
    assert len(replayed) == len(ledger["weight"]) / 4
    assert replayed == [1.0] * len(replayed)
