"""Tiny random sequence classifiers: scores against transformers alone, cuts, refusals, and a pool in a grader."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from actors.cluster import RayPlacement
from actors.grading import Grading
from actors.local import LocalPlacement, LocalWorker
from actors.reward_model import ClassifierPool, RewardModel, RewardModelSpec
from modeseek_ray.config import Resources, parse_config
from modeseek_ray.errors import ModelError
from modeseek_ray.rewards import GradeItem, Grader, build_grader
from modeseek_ray.rewards.parameters import ScoreModel
from tests.conftest import byte_tokenizer

TEXTS = ["yes", "no, and for a long list of reasons", "", "maybe " * 20, "ÿ€", "yes", "7"]
CONVERSATIONS = [
    [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": text}]
    for n, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write a random classifier of this class, with these settings, and say where."""

    def write(model_class: Any = Qwen3ForSequenceClassification, *, chat: bool = True, **more: Any) -> str:
        directory = tmp_path_factory.mktemp("classifier")
        tokenizer = byte_tokenizer()
        if not chat:
            tokenizer.chat_template = None
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 200,
            "pad_token_id": tokenizer.pad_token_id,
            "num_labels": 1,
        }
        if model_class is Qwen3ForSequenceClassification:
            config: Any = Qwen3Config(**{**sizes, "num_key_value_heads": 2, "head_dim": 8, **more})
        else:
            config = BertConfig(**{**sizes, **more})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():  # fresh heads are so small that all scores are nearly equal
                parameter.mul_(3)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return write


@pytest.fixture(scope="module")
def one_logit(save: Callable[..., str]) -> str:
    return save()


def logits_alone(path: str, conversations: Any) -> np.ndarray:
    """Each conversation by itself, unpadded, through transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for messages in conversations:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = tokenizer(*(m["content"] for m in messages), return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0].double().numpy())
    return np.stack(rows)


def scores(path: str, conversations: Any = CONVERSATIONS, **spec: Any) -> np.ndarray:
    model = RewardModel(RewardModelSpec(path, **{"micro_batch_tokens": 100, **spec}))
    return np.array([grade.reward for grade in model.score(conversations)])


@pytest.mark.parametrize("pad", [True, False])
def test_the_single_logit_is_transformers_own(save: Callable[..., str], pad: bool) -> None:
    path = save() if pad else save(pad_token_id=None)
    expected_N = logits_alone(path, CONVERSATIONS)[:, 0]
    assert np.ptp(expected_N) > 0.1  # the answers are told apart, else any order would pass
    np.testing.assert_allclose(scores(path), expected_N, atol=1e-5)


def test_a_developer_is_what_templates_call_system(one_logit: str) -> None:
    said = [
        [{"role": role, "content": "Be fair."}, *CONVERSATIONS[0]] for role in ("developer", "system", "user")
    ]
    developer, system, user = scores(one_logit, said)
    assert developer == pytest.approx(system, abs=1e-5)
    assert abs(system - user) > 1e-3


def test_a_question_and_its_answer_as_a_pair(save: Callable[..., str]) -> None:
    path = save(BertForSequenceClassification, chat=False)
    expected_N = logits_alone(path, CONVERSATIONS)[:, 0]
    np.testing.assert_allclose(scores(path), expected_N, atol=1e-5)
    three = [*CONVERSATIONS[0], {"role": "user", "content": "why?"}]
    [grade] = RewardModel(RewardModelSpec(path)).score([three])
    assert "no chat template" in (grade.error or "")


def test_a_label_s_probability(save: Callable[..., str]) -> None:
    labels = {0: "bad", 1: "good", 2: "unclear"}
    path = save(num_labels=3, id2label=labels, label2id={name: n for n, name in labels.items()})
    logits_NC = logits_alone(path, CONVERSATIONS)
    softmax_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores(path, label="good"), softmax_NC[:, 1], atol=1e-6)

    several = save(num_labels=3, id2label=labels, problem_type="multi_label_classification")
    np.testing.assert_allclose(
        scores(several, label="good"),
        1 / (1 + np.exp(-logits_alone(several, CONVERSATIONS)[:, 1])),
        atol=1e-6,
    )
    for label in (None, "best"):
        with pytest.raises(ModelError, match=r"3 label\(s\), bad, good, unclear"):
            RewardModel(RewardModelSpec(path, label=label)).setup()


def test_what_is_no_classifier_is_refused(tiny_dense: Path, one_logit: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lack 1 of the architecture's weights, score.weight"):
        RewardModel(RewardModelSpec(str(tiny_dense))).setup()
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        RewardModel(RewardModelSpec(str(tmp_path))).setup()
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded as a sequence classifier"):
        RewardModel(RewardModelSpec(str(tmp_path))).setup()
    with pytest.raises(ModelError, match=r"1 label\(s\)"):
        RewardModel(RewardModelSpec(one_logit, label="good")).setup()


def test_one_conversation_that_cannot_be_scored_spoils_no_other(one_logit: str) -> None:
    model = RewardModel(RewardModelSpec(one_logit))
    expected = [grade.reward for grade in model.score(CONVERSATIONS[:2])]
    long = [{"role": "user", "content": "x" * 300}]
    found = model.score([CONVERSATIONS[0], long, CONVERSATIONS[1]])
    assert "tokens; the classifier takes 1 to 200" in (found[1].error or "")
    assert [found[0].reward, found[2].reward] == pytest.approx(expected, abs=1e-6)
    assert model.score([]) == []

    with torch.no_grad():
        model._model.score.weight.fill_(float("nan"))
    assert "nan" in (model.score(CONVERSATIONS[:1])[0].error or "")


def grader_of(path: str, pool: ClassifierPool) -> Grader:
    messages = [
        {"role": "user", "content": "Is it {{ item.n }}?"},
        {"role": "assistant", "content": "{{ sample.output_text }}"},
    ]
    return build_grader(ScoreModel.model_validate({"model": path, "input": messages}), classifier=pool)


ITEMS = [GradeItem(text, {"n": n}, 1) for n, text in enumerate(TEXTS)]


async def test_a_pool_grades_in_order_and_its_size_changes_no_bit(
    one_logit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.reward_model.CHUNK", 4)
    spec = RewardModelSpec(one_logit, micro_batch_tokens=100)
    found = []
    for size in (1, 3):
        pool = ClassifierPool({spec.key: [LocalWorker(partial(RewardModel, spec), "") for _ in range(size)]})
        found.append(await grader_of(one_logit, pool).grade(ITEMS))
        await pool.close()
    assert found[0] == found[1]
    np.testing.assert_allclose(
        [grade.reward for grade in found[0]], logits_alone(one_logit, CONVERSATIONS)[:, 0], atol=1e-5
    )


async def test_a_job_s_judge_is_loaded_from_where_its_name_leads(one_logit: str) -> None:
    """`ft:judge` is what the job and its grader say; the directory is what the service made of it."""
    grader = {
        "type": "score_model",
        "model": "ft:judge",
        "input": [
            {"role": "user", "content": "Is it {{ item.n }}?"},
            {"role": "assistant", "content": "{{ sample.output_text }}"},
        ],
    }
    method = {"type": "online", "online": {"preset": "grpo", "grader": grader}}
    config = parse_config({"model": "m", "training_file": "f", "method": method})
    grading = Grading.of(config, (), {"ft:judge": Path(one_logit)})
    built = await grading.start(LocalPlacement())
    try:
        found = [grade.reward for grade in await built.grade(ITEMS)]
    finally:
        await built.close()
    np.testing.assert_allclose(found, logits_alone(one_logit, CONVERSATIONS)[:, 0], atol=1e-5)


async def test_on_ray_a_classifier_that_is_killed_is_started_again(one_logit: str, ray_cluster: Any) -> None:
    """kill -9 of the only worker: the next round is graded by the one Ray starts in its place."""
    placement = RayPlacement(Resources())
    spec = RewardModelSpec(one_logit)
    await placement.reserve(trainers=0, classifiers=[spec])
    pool = await placement.classifiers([spec], 1)
    try:
        await pool.setup()
        grader = grader_of(one_logit, pool)
        before = await grader.grade(ITEMS)
        [worker] = [p for p in psutil.process_iter(["cmdline"]) if is_classifier(p)]
        worker.kill()
        worker.wait(60)
        assert await grader.grade(ITEMS) == before
        np.testing.assert_allclose(
            [grade.reward for grade in before], logits_alone(one_logit, CONVERSATIONS)[:, 0], atol=1e-5
        )
    finally:
        await pool.close()
        await placement.close()


def is_classifier(process: psutil.Process) -> bool:
    """A worker of this test's own Ray, not of another run on the machine."""
    command = " ".join(process.info["cmdline"] or [])
    return command.startswith("ray::RewardModel") and os.getpid() in {p.pid for p in process.parents()}


async def test_on_ray_what_is_wrong_with_a_model_is_said_before_the_first_sample(
    tiny_dense: Path, ray_cluster: Any
) -> None:
    placement = RayPlacement(Resources())
    spec = RewardModelSpec(str(tiny_dense))
    await placement.reserve(trainers=0, classifiers=[spec])
    pool = await placement.classifiers([spec], 1)
    try:
        with pytest.raises(ModelError, match="score.weight"):
            await pool.setup()
    finally:
        await pool.close()
        await placement.close()
