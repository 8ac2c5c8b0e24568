"""Jobs on a cluster of three machines, one of which is killed, cut off, or does not see the storage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.laboratory import Laboratory, blind_to

pytestmark = pytest.mark.timeout(900)  # the first of them waits for the cluster and for the calm run
STEPS, CHECKPOINT_EVERY = 60, 5
TRAINING = {
    "epochs": 10,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "checkpoint_every": CHECKPOINT_EVERY,
    "evaluate_every": 60,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_dense: Path) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("lab"), tiny_dense.parent) as running:
        yield running


@pytest.fixture(scope="module")
def data(lab: Laboratory) -> str:
    """Registered by its path, which the nodes do not see."""
    rows = [{"prompt": f"say {i} ", "completion": f"{i} " * 60} for i in range(96)]
    path = lab.private / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = lab.http.post("/v1/files", json={"path": str(path), "purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def calm(lab: Laboratory, data: str, tiny_dense: Path) -> str:
    """The weights of a run in which nothing happens."""
    job_id = lab.submit(tiny_dense, data, TRAINING)
    lab.until(lambda: lab.job(job_id)["status"] == "succeeded", job_id=job_id)
    secret = json.loads((lab.storage / "jobs" / job_id / "attempts" / "1" / "secret.json").read_text())
    assert secret["url"] == lab.url  # an address that other machines can call
    assert list((lab.storage / "jobs" / job_id / "attempts" / "1" / "files").iterdir())  # fetched, not seen
    assert not (lab.home / "jobs").exists()
    return lab.weights_sha256(job_id)


def started(lab: Laboratory, model: Path, data: str, step: int) -> str:
    job_id = lab.submit(model, data, TRAINING)
    lab.until(lambda: lab.job(job_id)["progress"]["step"] >= step, job_id=job_id)
    return job_id


def check_recovered(lab: Laboratory, job_id: str, sha256: str, node: str) -> None:
    """The figures are for whoever asks (pytest -s): until the next attempt was begun, and until it trained."""
    lost = time.monotonic()
    lab.until(lambda: lab.job(job_id)["attempt"] == 2, job_id=job_id)
    noticed = time.monotonic() - lost
    before = lab.job(job_id)["progress"]["step"]
    lab.until(lambda: lab.job(job_id)["progress"]["step"] > before, job_id=job_id)
    print(
        f"node {node} lost: attempt 2 after {noticed:.1f} s, a new step after {time.monotonic() - lost:.1f} s"
    )
    lab.until(lambda: lab.job(job_id)["status"] == "succeeded", job_id=job_id)
    events = lab.events(job_id)
    steps = [e["data"]["step"] for e in events if "loss" in (e["data"] or {})]
    redone = len(steps) - len(set(steps))
    assert lab.job(job_id)["attempt"] == 2
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert redone <= CHECKPOINT_EVERY, steps
    assert any(node in event["message"] for event in events if event["level"] == "warn"), "which node it was"
    assert lab.weights_sha256(job_id) == sha256


def test_a_node_that_is_killed_costs_an_attempt_and_no_bit(
    lab: Laboratory, data: str, calm: str, tiny_dense: Path
) -> None:
    job_id = started(lab, tiny_dense, data, 8)
    lab.cluster.nodes[2].kill()
    check_recovered(lab, job_id, calm, lab.network.addresses[2])


def test_a_node_that_is_cut_off_costs_an_attempt_and_no_bit(
    lab: Laboratory, data: str, calm: str, tiny_dense: Path
) -> None:
    """Its rank lives on, and waits in a collective operation for the others."""
    lab.replace(2)
    job_id = started(lab, tiny_dense, data, 8)
    lab.network.cut_off(2)
    try:
        check_recovered(lab, job_id, calm, lab.network.addresses[2])
    finally:
        lab.network.connect(2)
        lab.cluster.nodes[2].kill()


def test_a_node_that_does_not_see_the_storage_is_named_before_anything_trains(
    lab: Laboratory, data: str, tiny_dense: Path
) -> None:
    lab.until(lambda: lab.alive() == 2, 90)
    lab.replace(2, *blind_to(lab.storage))
    job_id = lab.submit(tiny_dense, data, TRAINING)
    lab.until(lambda: lab.job(job_id)["status"] == "failed")
    error: dict[str, Any] = lab.job(job_id)["error"]
    assert error["code"] == "storage_not_shared"
    assert f"node {lab.network.addresses[2]} does not see {lab.storage}" in error["message"]
    assert not any("loss" in (event["data"] or {}) for event in lab.events(job_id))
