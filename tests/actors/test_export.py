"""The exported directory is the model that was trained, for anyone who loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.export import Exported, largest_difference
from actors.modeling import load_causal_lm
from modeseek_ray.config import Lora, Training
from modeseek_ray.errors import NumericsError
from modeseek_ray.types import Sample
from tests.actors.ranks import Start, Trainer, plan_for

EXPERTS = Lora(rank=4, alpha=8.0, target_experts=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tiny_dense: Path) -> Path:
    """The dense model with its head tied to its embeddings."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(tiny_dense)
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_dense).save_pretrained(directory)
    return directory


@torch.no_grad()
def log_probs_of(model: Any, samples: list[Sample]) -> np.ndarray:
    """log p of each sample's trained tokens in nats, from the model's own logits and not by our scoring."""
    found = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids_T.astype(np.int64))
        log_prob = model.eval()(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_prob[t - 1, ids[t]]) for t in np.flatnonzero(sample.trained_T)))
    return np.array(found)


def train(trainer: Trainer, samples: list[Sample]) -> np.ndarray:
    """A few steps; the log-probabilities the export has to show."""
    for i in range(3):
        trainer.step(samples, plan_for(samples, step=i, rate=1e-2))
    return trainer.score(samples)


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize(
    ("kind", "lora", "dtype"),
    [
        ("tiny_dense", None, "float32"),
        ("tiny_moe", None, "float32"),
        ("tied", None, "float32"),
        ("tiny_dense", None, "bfloat16"),
        ("tiny_dense", Lora(rank=4, alpha=8.0), "float32"),
        ("tiny_moe", EXPERTS, "float32"),
        ("tiny_moe", EXPERTS, "bfloat16"),
    ],
)
def test_round_trip(
    start: Start,
    samples: list[Sample],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: str,
    lora: Lora | None,
    dtype: str,
    zero_stage: int,
) -> None:
    model: Path = request.getfixturevalue(kind)
    trainer = start(
        model=model, training=Training(lora=lora), dtype=dtype, zero_stage=zero_stage, world_size=2
    )
    expected_N = train(trainer, samples)
    sha256 = trainer.sha256()
    trainer.each("export", str(tmp_path))
    assert trainer.sha256() == sha256, "exporting must not change the weights"
    found_N = log_probs_of(load_causal_lm(tmp_path, dtype), samples)
    off = largest_difference(Exported(samples, expected_N, sha256), found_N, dtype)
    assert off < (1e-5 if dtype == "float32" else 2e-2)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).exists() == (model / name).exists()
    assert not list(tmp_path.glob("*.bin"))
    before, after = (json.loads((p / "config.json").read_text()) for p in (model, tmp_path))
    assert after == {**before, "dtype": dtype}, "the configuration a user gets is the one he gave"


def test_adapter_loads_with_peft(start: Start, samples: list[Sample], tmp_path: Path, tiny_moe: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = start(model=tiny_moe, training=Training(lora=EXPERTS), world_size=2, zero_stage=3)
    expected_N = train(trainer, samples)
    trainer.each("export", str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert log_probs_of(model, samples) == pytest.approx(expected_N, rel=1e-5)


def test_a_model_that_differs_is_not_a_success(samples: list[Sample], tiny_dense: Path, start: Start) -> None:
    """One nat off on row 3, whose trained tokens are few."""
    expected_N = start().score(samples)
    found_N = log_probs_of(load_causal_lm(tiny_dense, "float32"), samples)
    exported = Exported(samples, expected_N, "")
    assert largest_difference(exported, found_N, "float32") < 1e-5
    for wrong in (expected_N[3] + 1.0, np.nan):
        found_N[3] = wrong
        with pytest.raises(NumericsError, match="differ from the trainer's: row 3 by"):
            largest_difference(exported, found_N, "float32")
