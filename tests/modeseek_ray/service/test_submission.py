"""A weighting that cannot work is refused when the job is submitted, not when its turn comes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modeseek_ray.weights import Facts
from tests.modeseek_ray.weights.test_weights_config import IMPOSSIBLE


def rows_of(facts: Facts) -> bytes:
    """A training file of which these facts hold: groups of equal size, rewards, log-probabilities."""
    size = facts.samples_per_prompt or 1
    rows: list[dict[str, Any]] = []
    for i in range(facts.num_rows or 8 * size):
        row: dict[str, Any] = {"prompt": f"question {i // size}", "completion": f" answer {i}"}
        if size > 1:
            row["group"] = i // size
        if facts.has_rewards is not False:
            row["reward"] = (facts.smallest_reward or 0.0) + i % 3
        if facts.has_log_behavior is not False:
            row["logprobs"] = -3.0
        rows.append(row)
    if facts.smallest_rewarded_group == 1 and size > 1:
        rows.append({**rows[0], "group": "alone", "completion": " alone"})
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(("fields", "facts", "path"), IMPOSSIBLE)
def test_an_impossible_weighting_is_refused_at_once(
    service: Any, fields: dict[str, Any], facts: Facts, path: str
) -> None:
    file_id = service.upload(rows_of(facts))
    training: dict[str, Any] = {"batch_size": facts.batch_size} if facts.batch_size else {}
    body: dict[str, Any] = {"model": str(service.model), "training_file": file_id}
    if facts.replay_share:
        training["replay_share"] = facts.replay_share
        body["replay_file"] = file_id
    body["method"] = {"type": "weighted", "weighted": {**fields, "training": training}}
    with service.http() as http:
        answer = http.post("/v1/fine_tuning/jobs", json=body)
        jobs = http.get("/v1/fine_tuning/jobs").json()["data"]
    error = answer.json()["error"]
    # One step on each batch under clipping is refused by the block as a whole, before its weighting is looked at.
    param = "method.weighted" if path == "token.scheme" else f"method.weighted.{path}"
    assert (answer.status_code, error["param"], bool(error["mend"])) == (400, param, True)
    assert jobs == []
