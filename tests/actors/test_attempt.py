"""Whole attempts, from files to a checked export: in this process, and on Ray."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors import attempt as attempt_module
from actors.attempt import Attempt
from actors.attempt_spec import AttemptResult, AttemptSpec
from actors.commands.preflight import preflight
from actors.journal import CallbackSink, ResultJournal
from actors.local import LocalPlacement
from actors.placement import Placement
from actors.trackers import trackers_of
from modeseek_ray.config import parse_config
from modeseek_ray.data.check import inspect_job
from modeseek_ray.errors import ConfigError, NumericsError
from modeseek_ray.reports.results import read_job, read_metrics
from tests.modeseek_ray.weights.test_weights_watch import SECTION_7

ANCHORED = {
    "likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": {"ess": {"floor": 0.5}}}
}
STEPS = 6
LEDGER = ("row", "log_reference", "num_tokens")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve rows of unequal length to train on, four to keep. Rows of one prompt do not stand together."""
    directory = tmp_path_factory.mktemp("data")
    letters = "abcdefghijkl"
    training = [
        {
            "messages": [
                {"role": "user", "content": f"say {c}"},
                {"role": "assistant", "content": c * (1 + j % 5)},
            ],
            "group": j % 6,
        }
        for j, c in enumerate(letters)
    ]
    retention = [
        {"prompt": f"{c} then", "completion": f" {c}{c}", "task": "twice", "accept": []} for c in "wxyz"
    ]
    paths = {"training_file": directory / "train.jsonl", "retention_file": directory / "old.jsonl"}
    for path, rows in zip(paths.values(), (training, retention), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def _spec(
    model: Path, files: Mapping[str, Path], out: Path, weighting: Any = None, **resources: Any
) -> AttemptSpec:
    training = {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 0.01,
        "evaluate_every": 3,
        "checkpoint_every": 2,
    }
    given = dict(weighting or {})
    training |= given.pop("training", {})
    config = parse_config(
        {
            "model": str(model),
            **{role: str(path) for role, path in files.items()},
            "method": {"type": "weighted", "weighted": {**given, "training": training}},
            "resources": resources,
        }
    )
    return AttemptSpec("job", 1, config, files, model, out, out / "cache")


def _run(spec: AttemptSpec, placement: Placement | None = None, on_event: Any = None) -> AttemptResult:
    sink = CallbackSink(on_event or (lambda event: None))
    journal = ResultJournal(spec.directory / "results", sink)
    return asyncio.run(Attempt(spec, placement or LocalPlacement(), journal).run())


def _losses(spec: AttemptSpec) -> list[float]:
    return read_metrics(spec.directory / "results").known("loss")[1].tolist()


def test_a_job_leaves_a_model_figures_and_a_report(
    tiny_dense: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    spec = _spec(tiny_dense, files, tmp_path, ANCHORED)
    result = _run(spec)
    assert result.model_path is not None and (result.model_path / "model.safetensors").is_file()
    assert {path.name for path in result.result_files} == {"metrics.csv", "weights.parquet", "report.html"}
    metrics = read_metrics(tmp_path / "results")
    assert metrics.step_S.tolist() == list(range(STEPS + 1))
    assert metrics.first("retention.kl_nats") == pytest.approx(0, abs=1e-9)
    assert metrics.last("retention.kl_nats") > 0
    assert metrics.last("gamma") > 0
    record = read_job(tmp_path / "results")
    assert (record.status, record.weights_sha256) == ("succeeded", result.weights_sha256)


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("tiny_dense", {"routes/load_variation", "routes/dead_experts"}),
        ("tiny_moe", {"weights.L_over_noise"}),  # scorer and trainer agree in every bit here: no noise
    ],
)
def test_the_figures_of_section_7_arrive_everywhere(
    name: str, absent: set[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In events, metrics.csv, TensorBoard and the report; all but what compares an engine with the trainer."""
    paths = {role: tmp_path / f"{role}.jsonl" for role in ("training", "validation", "retention")}
    for seed, (role, path) in enumerate(paths.items()):
        rng = np.random.default_rng(seed)
        rows = [
            {"prompt": f"{role} {j}", "completion": "ab" * int(rng.integers(1, 5)), "reward": float(j % 3)}
            for j in range(32 if role == "training" else 4)
        ]
        rows = [{**row, "task": "twice"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weighting = {
        **ANCHORED,
        "reward": {"scheme": "exponential", "beta": 1.0, "scope": "batch"},
        "token": {"scheme": "psft", "clip": 0.01},
        "training": {"batch_size": 32, "epochs": 4, "inner_steps": 2},
    }
    files = {f"{role}_file": path for role, path in paths.items()}
    # Micro-batches other than the scorer's: without a difference there is no noise that L could be over.
    model = request.getfixturevalue(name)
    spec = _spec(model, files, tmp_path / "job", weighting, micro_batch_size=3)
    results, events = spec.directory / "results", list[Mapping[str, Any]]()
    trackers = trackers_of(spec.config, results, "job")
    journal = ResultJournal(results, CallbackSink(events.append), trackers=trackers)
    asyncio.run(Attempt(spec, LocalPlacement(), journal).run())

    by_sampler = {"MoE: section 6"}
    wanted = {
        name.replace("TASK", "twice")
        for key, names in SECTION_7.items()
        if key not in by_sampler
        for name in names
    }
    wanted -= {"validation.accuracy", *absent}  # no row says what is right
    numbers = wanted - {"bound_by"}
    metrics = read_metrics(results)
    assert {name for name in numbers if name not in metrics} == set()
    assert wanted <= {name for event in events if event["type"] == "metrics" for name in event["data"]}
    board = EventAccumulator(str(results / "tensorboard"))
    board.Reload()
    assert {name.replace(".", "/", 1) for name in numbers} <= set(board.Tags()["scalars"])
    report = (results / "report.html").read_text()
    assert [name for name in wanted if f'<th scope="row">{name}</th>' not in report] == []
    assert metrics.first("parameter_distance") == 0
    assert metrics.last("parameter_distance") > 0
    assert metrics.last("validation.kl_reverse_nats") > 0


def test_first_order_weights_of_a_job(tiny_dense: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Token ratios to the start, measured by the trainer: zero before the first step, and told of ever after."""
    f = {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.3, "length_exponent": 0}
    _run(_spec(tiny_dense, files, tmp_path, {"likelihood": {**f, "approximation": "first_order"}}))
    metrics = read_metrics(tmp_path / "results")
    delta_S = metrics.known("weighting/mean_abs_delta")[1]
    assert len(delta_S) == STEPS
    assert delta_S[0] < 1e-5 < delta_S[-1]
    assert metrics.first("ess_ratio") == 1.0
    assert metrics.known("ess_ratio")[1].min() < 1.0


def test_gamma_by_each_samples_kl(tiny_dense: Path, files: dict[str, Path], tmp_path: Path) -> None:
    gamma = {"per_sample": {"distance": "kl", "floor": 0.5, "warmup": 0.0}}
    f = {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": gamma}
    _run(_spec(tiny_dense, files, tmp_path, {"likelihood": f}))
    metrics = read_metrics(tmp_path / "results")
    assert metrics.last("gamma") > 0
    assert metrics.known("ess_ratio")[1].min() < 1.0


def test_flow_divides_by_the_median_of_the_whole_data_set(
    tiny_dense: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Known before the first step, so gamma is one number for the job, whatever rows a batch holds."""
    _run(_spec(tiny_dense, files, tmp_path, {"preset": "flow"}))
    ledger = pq.read_table(tmp_path / "results" / "weights.parquet").to_pydict()
    nll = {row: -log / n for row, log, n in zip(*(ledger[k] for k in LEDGER), strict=True)}
    assert len(nll) == 12
    gammas_S = read_metrics(tmp_path / "results").known("gamma")[1]
    np.testing.assert_allclose(gammas_S, 1 / np.median(list(nll.values())), rtol=1e-6)


@pytest.mark.parametrize("has_behavior", [False, True])
def test_first_order_ratios_to_the_data_need_every_token(
    tiny_dense: Path, tmp_path: Path, has_behavior: bool
) -> None:
    """A sum is enough for the exact ratio, and a model of the data is; neither says what one token was."""
    f = {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.3, "length_exponent": 0}
    rows = [{"prompt": f"say {j}", "completion": " a", "logprobs": -3.0} for j in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for approximation in ("exact", "first_order"):
        weighting = {"likelihood": {**f, "approximation": approximation}}
        spec = _spec(tiny_dense, {"training_file": path}, tmp_path, weighting)
        data = inspect_job(spec.config, spec.files, tiny_dense)
        if approximation == "exact":
            assert preflight(spec.config, data, tiny_dense, has_behavior=has_behavior).data is data
            continue
        with pytest.raises(ConfigError, match="log-probability of every token") as caught:
            preflight(spec.config, data, tiny_dense, has_behavior=has_behavior)
        assert caught.value.param == "method.weighted.likelihood.approximation"


def test_gamma_zero_is_plain_fine_tuning_bit_for_bit(
    tiny_moe: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    plain = _run(_spec(tiny_moe, files, tmp_path / "sft"))
    zero = {"likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.0}}
    weighted = _run(_spec(tiny_moe, files, tmp_path / "zero", zero))
    assert weighted.weights_sha256 == plain.weights_sha256


def test_an_attempt_that_was_stopped_ends_with_the_same_bits(
    tiny_dense: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Also where its newest checkpoint was damaged meanwhile: then from the one before, and it says so."""
    whole = _spec(tiny_dense, files, tmp_path / "whole", ANCHORED)
    expected = _run(whole)

    class Crash(Exception):
        """Between two checkpoints."""

    def crash_at_five(event: Mapping[str, Any]) -> None:
        if event["data"].get("step") == 5 and "loss" in event["data"]:
            raise Crash

    broken = _spec(tiny_dense, files, tmp_path / "broken", ANCHORED)
    with pytest.raises(Crash):
        _run(broken, on_event=crash_at_five)
    damaged = broken.directory / "checkpoints" / "step-4.a1"
    (damaged / "controller.json").write_text("{}")
    events: list[Mapping[str, Any]] = []
    assert _run(broken, on_event=events.append).weights_sha256 == expected.weights_sha256
    assert _losses(broken) == _losses(whole)
    [said] = [e["message"] for e in events if e["level"] == "warn" and "damaged" in e["message"]]
    assert "step-4.a1" in said and "from step-2.a1" in said


def test_an_export_that_differs_is_no_success(
    tiny_dense: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file, save_file

    real_export = attempt_module.TrainerPool.export

    async def corrupting(self: Any, directory: Path) -> None:
        await real_export(self, directory)
        tensors = load_file(directory / "model.safetensors")
        name = next(n for n in tensors if n.endswith("down_proj.weight"))
        save_file({**tensors, name: tensors[name] * np.float32(1.5)}, directory / "model.safetensors")

    monkeypatch.setattr(attempt_module.TrainerPool, "export", corrupting)
    with pytest.raises(NumericsError, match="exported model's log-probabilities differ"):
        _run(_spec(tiny_dense, files, tmp_path))


def test_local_mode_has_one_trainer(tiny_dense: Path, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--local has one trainer"):
        _run(_spec(tiny_dense, files, tmp_path, trainers=2))


@pytest.mark.slow
def test_ray_gives_the_same_job(
    ray_cluster: Any, tiny_moe: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """One rank: the same bits as in this process. Two, with samples of their own or shared: its losses to rounding."""
    from actors.cluster import RayPlacement

    local = _spec(tiny_moe, files, tmp_path / "local", ANCHORED)
    one = _spec(tiny_moe, files, tmp_path / "one", ANCHORED)
    two = _spec(tiny_moe, files, tmp_path / "two", ANCHORED, trainers=2, scorers=2)
    assert _run(one, RayPlacement(one.config.resources)).weights_sha256 == _run(local).weights_sha256
    shared = _spec(tiny_moe, files, tmp_path / "shared", ANCHORED, trainers=2, sequence_parallel=2)
    for spec in (two, shared):
        _run(spec, RayPlacement(spec.config.resources))
        assert _losses(spec) == pytest.approx(_losses(local), rel=1e-5)
    # From the two ranks' fourth step on, one goes on: their weights and moments, its own order of sums.
    shutil.rmtree(two.directory / "checkpoints" / f"step-{STEPS}.a1")
    events: list[Mapping[str, Any]] = []
    assert _run(replace(two, config=one.config), on_event=events.append).outcome.ended == "run"
    assert [e["data"]["step"] for e in events if "loss" in e["data"]] == [5, 6]
    assert _losses(two) == pytest.approx(_losses(local), rel=1e-5)
    assert any(e["level"] == "warn" and "inexactly: 2 ranks -> 1" in e["message"] for e in events)
