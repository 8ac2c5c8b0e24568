"""`modeseek rerank` on a real model: features by hand, the picked rows as they were, infeasible ones counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.commands.rerank import rerank
from actors.reference import ReferenceModel, ScoringSpec
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError

ANSWERS = ("aaaa", "zzzz", "ab")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three prompts with three answers; those of the last have no grade."""
    lines = [
        {
            "prompt": f"say {p}",
            "completion": answer,
            "group": p,
            **({"reward": float(i == 1)} if p < 2 else {}),
        }
        for p in range(3)
        for i, answer in enumerate(ANSWERS)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_features_are_the_mean_hidden_states_of_the_trained_tokens(rows: Path, tiny_dense: Path) -> None:
    samples = load_samples(rows, ChatTokenizer(tiny_dense), max_length=64)[:2]
    found_ND = ReferenceModel(ScoringSpec(str(tiny_dense))).features(samples)
    model = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    for sample, found_D in zip(samples, found_ND, strict=True):
        with torch.no_grad():
            output = model(torch.from_numpy(sample.token_ids_T)[None].long(), output_hidden_states=True)
        predicting_T = np.flatnonzero(sample.trained_T) - 1
        expected_D = output.hidden_states[-1][0, predicting_T].double().mean(0).numpy()
        np.testing.assert_allclose(found_D, expected_D, atol=1e-5)


def test_grades_of_some_prompts_pick_the_answers_of_all(
    rows: Path, tiny_dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picked.jsonl"
    assert rerank(rows, tiny_dense, out, beta=1.0, ridge=1e-6, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["graded"], found["prompts"]) == (9, 6, 3)
    assert found["picked"] == [1, 4, 7]  # the answer graded best, also where nobody graded
    assert found["infeasible_share"] == np.mean(np.array(list(found["weights"].values())) < 0)
    picked = [json.loads(line) for line in out.read_text().splitlines()]
    assert picked == [json.loads(rows.read_text().splitlines()[row]) for row in (1, 4, 7)]


def test_without_a_reward_it_says_so(tiny_dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(DataError, match="no row has a reward"):
        rerank(path, tiny_dense, None, beta=1.0, ridge=1e-3)
