"""Answers over HTTP by OpenAI's client: real vLLM in a real Ray job, started by the first question."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from safetensors.numpy import load_file

from modeseek_ray.client import Client
from modeseek_ray.playground import data_files
from tests.conftest import head_of
from tests.e2e.conftest import Service

QUESTION = "Sort these letters: d b a c"


def engines(service: Service) -> list[psutil.Process]:
    """Inference engines, not the shells Ray starts them by."""
    found = []
    for process in service.family():
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "answer" in command and "python" in command[0]:
            found.append(process)
    return found


def greedy(model: Path, prompt: str, num_tokens: int) -> list[int]:
    """What transformers' own generate writes, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    given = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        written = reference.generate(**given, do_sample=False, max_new_tokens=num_tokens)
    tokens: list[int] = written[0, given["input_ids"].shape[1] :].tolist()
    return tokens


def test_a_model_is_asked_killed_asked_again_and_left_alone(service: Service, playground_moe: Path) -> None:
    from transformers import AutoTokenizer

    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=600)
    chat: dict[str, Any] = {
        "model": str(playground_moe),
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**chat, logprobs=True)
    [choice] = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokenizer = AutoTokenizer.from_pretrained(playground_moe)
    expected = greedy(playground_moe, QUESTION, 24)
    said = [token.token for token in choice.logprobs.content]
    assert said == [tokenizer.decode([token]) for token in expected]
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected)

    streamed = "".join(
        piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**chat, stream=True)
    )
    assert streamed == choice.message.content

    # The best of eight, by a grader that can be checked from the texts.
    grader = {
        "type": "text_similarity",
        "name": "like",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.wanted }}",
        "evaluation_metric": "fuzzy_match",
    }
    extra = {"best_of": 8, "grader": grader, "item": {"wanted": choice.message.content}}
    graded = client.chat.completions.create(**{**chat, "temperature": 1.5}, n=2, seed=1, extra_body=extra)
    [rewards] = graded.rewards  # type: ignore[attr-defined]
    assert len(rewards) == 8 and [c.reward for c in graded.choices] == sorted(rewards)[:-3:-1]  # type: ignore[attr-defined]

    # Log-probabilities are the model's own, whatever the temperature; the likeliest answers come first.
    ranked = client.completions.create(
        model=str(playground_moe),
        prompt="a",
        n=4,
        best_of=8,
        max_tokens=6,
        temperature=1.3,
        logprobs=0,
        seed=2,
    )
    means = [np.mean(c.logprobs.token_logprobs) for c in ranked.choices if c.logprobs]  # type: ignore[arg-type]
    assert len(means) == 4 and means == sorted(means, reverse=True)

    [engine] = engines(service)
    engine.send_signal(signal.SIGKILL)
    assert client.chat.completions.create(**chat).choices[0].message.content == choice.message.content
    [other] = engines(service)
    assert other.pid != engine.pid
    deadline = time.monotonic() + 120
    while engines(service) and time.monotonic() < deadline:  # idle
        time.sleep(0.5)
    assert not engines(service)


def weights(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shard in sorted(model.glob("*.safetensors")):
        found.update(load_file(shard))
    return found


@pytest.mark.slow
def test_a_checkpoint_of_two_zero_ranks_answers_as_the_finished_model(
    service: Service, playground_moe: Path, modeseek_home: Path, tmp_path: Path
) -> None:
    """Its last one: written out by two trainers at ZeRO-3, it has the bits of the job's own export."""
    training = {"epochs": 1, "batch_size": 16, "max_steps": 2, "checkpoint_every": 1, "learning_rate": 1e-3}
    with Client(service.url) as client:
        file = client.upload(head_of(data_files(modeseek_home)["new-task.train"], 64, tmp_path))["id"]
        job = client.submit(
            {
                "model": str(playground_moe),
                "training_file": file,
                "method": {"type": "supervised", "supervised": {"training": training}},
                "resources": {"trainers": 2, "zero_stage": 3},
            }
        )["id"]
        done = client.wait(job, timeout_s=400)
        assert done["status"] == "succeeded", done["error"]
        question = [{"role": "user", "content": QUESTION}]
        checkpoint = f"{done['fine_tuned_model']}:ckpt-step-2"
        answer = client.ask(checkpoint, question, max_tokens=16, temperature=0)
    made = service.home / "jobs" / job / "model"
    [written_out] = service.home.glob("engines/*/model")
    found, expected, start = weights(written_out), weights(made), weights(playground_moe)
    assert found.keys() == expected.keys() == start.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert any(not np.array_equal(found[name], start[name]) for name in found)

    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(made).decode(greedy(made, QUESTION, 16), skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text
