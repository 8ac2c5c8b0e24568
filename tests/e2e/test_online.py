"""OpenAI's reinforcement fine-tuning by their own client: real vLLM, Ray and DeepSpeed behind it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest
from openai.types.fine_tuning import FineTuningJob

from modeseek_ray.playground import data_files
from tests.conftest import head_of

JOB_DEADLINE_S = 600
GRADER = {
    "type": "string_check",
    "name": "exact",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.reference }}",
    "operation": "eq",
}


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=2)


def wait(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    deadline = time.monotonic() + JOB_DEADLINE_S
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status == "succeeded":
            return job
        assert job.status not in ("failed", "cancelled"), job.error
        time.sleep(0.5)
    raise AssertionError(f"{job_id} is still {job.status}")


def test_reinforcement_and_then_another_weighting_of_its_samples(
    client: openai.OpenAI, playground_moe: Path, modeseek_home: Path, tmp_path: Path
) -> None:
    prompts = head_of(data_files(modeseek_home)["new-task.prompts"], 16, tmp_path)
    file = client.files.create(file=prompts, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=str(playground_moe),
        training_file=file.id,
        method={
            "type": "reinforcement",
            "reinforcement": {  # type: ignore[typeddict-item]
                "grader": GRADER,
                "hyperparameters": {"batch_size": 8, "n_epochs": 2, "compute_multiplier": 0.5},
            },
        },
        extra_body={"resources": {"trainers": 2, "zero_stage": 2}},
    )
    done = wait(client, job.id)
    assert done.fine_tuned_model is not None
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    figures = [e.data for e in events if e.type == "metrics" and "rollout.reward" in (e.data or {})]
    assert len(figures) == 4  # 16 questions twice, 8 a round
    assert all(f["rollout.written"] == 32 for f in figures)  # type: ignore[index]
    assert any("agree with the trainer" in e.message for e in events)

    results = {client.files.retrieve(f).filename: f for f in done.result_files}
    name = next(name for name in results if name.endswith("rollouts.parquet"))
    table = pq.read_table(io.BytesIO(client.files.content(results[name]).read()))
    assert table.num_rows == 128 and len(set(table["group"].to_pylist())) == 32

    weighting = {
        "reward": {"scheme": "exponential", "beta": 0.5, "scope": "group"},
        "training": {"max_steps": 2, "batch_size": 16},
    }
    again = client.fine_tuning.jobs.create(
        model=str(playground_moe),
        training_file=results[name],
        method={"type": "weighted", "weighted": weighting},  # type: ignore[typeddict-item,typeddict-unknown-key]
    )
    assert wait(client, again.id).trained_tokens


def test_what_cannot_work_is_refused_before_anything_starts(
    client: openai.OpenAI, playground_moe: Path, playground_dense: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    file = client.files.create(file=prompts, purpose="fine-tune").id

    def refusal(model: Path, **online: Any) -> dict[str, Any]:
        body = {
            "model": str(model),
            "training_file": file,
            "method": {"type": "online", "online": {"preset": "grpo", **online}},
        }
        answer = client.post("/fine_tuning/jobs/validate", body=body, cast_to=object)
        return answer["error"]  # type: ignore[index,no-any-return]

    assert refusal(playground_moe)["param"] == "method.online.grader"
    missing = refusal(playground_moe, grader=GRADER, rollout={"max_tokens": 8})
    assert missing["param"] == "method.online.grader.reference" and "no row has" in missing["message"]
    fitting = {**GRADER, "reference": "{{ item.answer }}"}
    dense = refusal(playground_dense, grader=fitting, routing_replay="R3", rollout={"max_tokens": 8})
    assert dense["param"] == "method.online.routing_replay" and "MoE" in dense["message"]
