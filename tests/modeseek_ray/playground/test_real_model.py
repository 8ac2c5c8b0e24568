"""The MoE model as users get it: built here where it is not cached."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeseek_ray.playground import data_files, locate, new_task
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.mixture import Row
from modeseek_ray.playground.pretrain import collate, greedy_correct, mean_loss
from modeseek_ray.playground.skills import SKILLS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_FORMATS = len(new_task.FORMATS)


@pytest.fixture(scope="module")
def model(playground_moe):
    return AutoModelForCausalLM.from_pretrained(playground_moe).eval()


@pytest.fixture(scope="module")
def tokenizer(playground_moe):
    return AutoTokenizer.from_pretrained(playground_moe)


@pytest.fixture(scope="module")
def rows(modeseek_home):
    """Every file's rows, parsed."""
    files = data_files(modeseek_home)
    return {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in files.items()}


def _row(record, answer=None):
    question, right = (message["content"] for message in record["messages"])
    return Row(question, answer or right, record["task"])


def test_it_is_the_one_that_is_located(playground_moe, modeseek_home):
    assert locate("moe", modeseek_home) == playground_moe


def test_it_passed_the_gate_and_says_so(playground_moe):
    measured = json.loads((playground_moe / "playground.json").read_text())
    assert set(measured["held_out_accuracy"]) == {skill.name for skill in SKILLS} | {"facts"}
    assert min(measured["held_out_accuracy"].values()) >= 0.9
    assert 1e6 <= measured["num_parameters"] <= 3e6


def test_every_old_task_of_the_retention_file_is_held(model, tokenizer, rows):
    """What was never held cannot be forgotten. 40 rows a task: .85 leaves room for two unlucky rows."""
    by_task = defaultdict(list)
    for record in rows["old-tasks.retention"]:
        if "messages" in record:
            by_task[record["task"]].append(_row(record))
    assert len(by_task) == len(SKILLS) + 1
    accuracy = {
        task: sum(greedy_correct(model, tokenizer, some)) / len(some) for task, some in by_task.items()
    }
    assert min(accuracy.values()) >= 0.85, accuracy
    assert accuracy["facts"] >= 0.9


def test_text_was_learnt(playground_moe):
    """Far below the ln 1024 = 6.93 nats of knowing nothing."""
    assert json.loads((playground_moe / "playground.json").read_text())["held_out_text_nll"] < 4.5


def test_the_new_task_is_new(model, tokenizer, rows):
    """Greedy decoding writes no right answer, in any format, to more than a few prompts."""
    records = rows["new-task.valid"]
    right = [
        greedy_correct(model, tokenizer, [_row(r, [_row(r).answer, *r["accept"]][format_]) for r in records])
        for format_ in range(NUM_FORMATS)
    ]
    assert sum(any(formats) for formats in zip(*right, strict=True)) / len(records) < 0.3


def test_formats_lie_near_to_far(model, tokenizer, rows):
    """Nats of the whole answer under the base model: each format at least 1.5 times the one before."""
    records = rows["new-task.valid"]
    nats = []
    for format_ in range(NUM_FORMATS):
        batch = collate(tokenizer, [_row(r, [_row(r).answer, *r["accept"]][format_]) for r in records])
        tokens_per_answer = (batch[2] >= 0).sum().item() / len(records)
        nats.append(mean_loss(model, batch).item() * tokens_per_answer)
    assert all(far > 1.5 * near for near, far in pairwise(nats)), nats
    assert nats[-1] > 10 * nats[0]


def test_facts_are_known_as_written(model, tokenizer):
    prompt = tokenizer("<|user|>country code of Japan<|end|><|assistant|>", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == dict(facts())["country code of Japan"] + "<|end|>"
