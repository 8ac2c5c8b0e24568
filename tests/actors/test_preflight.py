"""What a weighting asks of the data it is for, from the file to the refusal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.commands.preflight import preflight
from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.data.check import inspect_job
from modeseek_ray.data.report import DataReport
from modeseek_ray.data.weighting import facts_of
from modeseek_ray.errors import ConfigError

FLOOR = {"likelihood": {"scheme": "ratio_power", "of": "initial", "gamma": {"ess": {"floor": 0.3}}}}


def inspected(
    directory: Path, model: Path, rows: Sequence[dict[str, Any]], weighting: dict[str, Any], **training: Any
) -> tuple[JobConfig, DataReport]:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say", "completion": " a", **row}) + "\n" for row in rows))
    method = {"type": "weighted", "weighted": {**weighting, "training": training}}
    config = parse_config({"model": str(model), "training_file": str(path), "method": method})
    return config, inspect_job(config, {"training_file": path}, model)


@pytest.mark.parametrize("batch_size", ["auto", 64, 3])
def test_a_floor_over_three_rows_cannot_bind_whatever_the_batch_size(
    batch_size: Any, tiny_dense: Path, tmp_path: Path
) -> None:
    config, data = inspected(tmp_path, tiny_dense, [{}] * 3, FLOOR, batch_size=batch_size)
    with pytest.raises(ConfigError, match=r"over 3 rows the ratio is at least 0\.333") as caught:
        preflight(config, data, tiny_dense, has_behavior=False)
    assert caught.value.code == "floor_cannot_bind"
    assert caught.value.param == "method.weighted.likelihood.gamma.ess.floor"
    config, data = inspected(tmp_path, tiny_dense, [{}] * 4, FLOOR, batch_size="auto")
    assert preflight(config, data, tiny_dense, has_behavior=False).data is data


def test_best_of_n_is_held_against_the_prompt_with_fewest_rewards(tiny_dense: Path, tmp_path: Path) -> None:
    """Groups of 2, 2, 2 and 1: the job would stop at the batch with the last."""
    rows = [{"group": g, "reward": i} for g in "abc" for i in range(2)]
    config, data = inspected(tmp_path, tiny_dense, [*rows, {"group": "d", "reward": 1}], {"preset": "bon"})
    with pytest.raises(ConfigError, match="best of 2 from the 1 rewarded samples") as caught:
        preflight(config, data, tiny_dense, has_behavior=False)
    assert caught.value.param == "method.weighted.reward.n"
    config, data = inspected(tmp_path, tiny_dense, [*rows, {"group": "d"}], {"preset": "bon"})
    assert facts_of(config, data.training, has_behavior=False).smallest_rewarded_group == 2
    assert preflight(config, data, tiny_dense, has_behavior=False).data is data


@pytest.mark.parametrize(
    ("weighting", "code", "path"),
    [
        ({"reward": {"scheme": "exponential", "beta": 1.0}}, "no_rewards", "reward.scheme"),
        (
            {"likelihood": {"scheme": "ratio_power", "of": "policy_over_data", "gamma": 0.5}},
            "no_logprobs",
            "likelihood.of",
        ),
    ],
)
def test_what_the_rows_lack_is_said_with_the_path_of_who_wants_it(
    weighting: dict[str, Any], code: str, path: str, tiny_dense: Path, tmp_path: Path
) -> None:
    config, data = inspected(tmp_path, tiny_dense, [{"logprobs": -3}, {}], weighting)
    with pytest.raises(ConfigError) as caught:
        preflight(config, data, tiny_dense, has_behavior=False)
    assert (caught.value.code, caught.value.param) == (code, f"method.weighted.{path}")
    assert caught.value.mend
