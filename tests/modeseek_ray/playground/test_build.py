"""The way from a recipe to an ordinary Hugging Face directory, with a model too small to be good."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import jinja2
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeseek_ray.errors import ModelError
from modeseek_ray.playground import build as builder
from modeseek_ray.playground import cache
from modeseek_ray.playground.build import build, refuse_weak
from modeseek_ray.playground.model import new_model
from modeseek_ray.playground.pretrain import IGNORED, Row, collate, greedy_correct, learning_rate, mean_loss
from modeseek_ray.playground.recipe import RECIPES
from modeseek_ray.playground.skills import SKILLS
from modeseek_ray.playground.tokenizer import train_tokenizer

TINY: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
TINY |= {
    "intermediate_size": 16,
    "steps": 5,
    "chat_rows": 8,
    "text_rows": 2,
    "text_length": 16,
    "warmup_steps": 1,
}
TINY_MOE = replace(RECIPES["moe"], num_experts=4, **TINY)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "sort DACB\nécht {x}"},
    {"role": "assistant", "content": "ABCD"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A really built MoE directory; only the gate is open, since five steps teach nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "HELD_OUT_ACCURACY", 0.0)
        return build("moe", tmp_path_factory.mktemp("home"), progress=False, recipe=TINY_MOE)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def test_a_model_that_learnt_nothing_is_refused_and_not_kept(tmp_path):
    with pytest.raises(ModelError, match=r"playground/moe did not learn: .*sort 0\.\d+") as refused:
        build("moe", tmp_path, progress=False, recipe=replace(TINY_MOE, steps=1))
    assert refused.value.code == "playground_too_weak"
    assert not [path for path in (tmp_path / "playground").iterdir() if path.is_dir()]


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, capsys):
    with pytest.raises(ModelError):
        build("moe", tmp_path, recipe=replace(TINY_MOE, steps=2))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("playground/moe")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert "nats ETA 0 s" in lines[-1]


def test_the_gate_is_at_nine_tenths():
    refuse_weak({"sort": 0.9, "copy": 1.0}, "moe")
    with pytest.raises(ModelError, match=r"sort 0\.899 \(at least 0\.9"):
        refuse_weak({"sort": 0.899, "copy": 1.0}, "moe")


def test_what_is_written(tiny):
    names = {path.name for path in tiny.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "playground.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    measured = json.loads((tiny / "playground.json").read_text())
    assert set(measured["held_out_accuracy"]) == {skill.name for skill in SKILLS} | {"facts"}
    assert measured["held_out_text_nll"] > 0
    assert measured["recipe"]["steps"] == 5
    assert {"wall_s", "cpu_s", "num_parameters", "seed"} <= set(measured)


def test_loads_as_an_ordinary_model(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.model_type == "qwen3_moe"
    assert model.dtype == torch.float32
    assert (
        model.generation_config.eos_token_id
        == tokenizer.eos_token_id
        == tokenizer.convert_tokens_to_ids("<|end|>")
    )
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_second_build_returns_the_first(tiny):
    before = (tiny / "model.safetensors").stat().st_mtime_ns
    again = build("moe", tiny.parents[1], progress=False, recipe=TINY_MOE)
    assert again == tiny
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before


def test_a_second_builder_waits_for_the_first(tiny):
    """While another holds the lock nothing is returned; once released, what it built is."""
    found = []
    lock = cache.build_lock(tiny)
    waiter = threading.Thread(
        target=lambda: found.append(build("moe", tiny.parents[1], progress=False, recipe=TINY_MOE))
    )
    with lock:
        waiter.start()
        waiter.join(timeout=0.5)
        assert found == []
    waiter.join(timeout=60)
    assert found == [tiny]


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("sort DACB", "def f(x):\n    return [x]", "écht ∑ 漢字\t!", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("symbols", ["DACB", "0123456789", "([])[]"])
def test_each_symbol_of_a_skill_is_one_token(tokenizer, symbols):
    assert tokenizer.tokenize(symbols) == list(symbols)


def test_words_of_the_questions_are_one_token(tokenizer):
    for skill in SKILLS:
        assert tokenizer.tokenize(skill.name) == [skill.name]


@pytest.mark.parametrize("prompt_only", [False, True])
def test_template_and_ids_without_transformers(tiny, tokenizer, prompt_only):
    """`tokenizers` and jinja2 alone give what transformers gives, text and ids."""
    messages = MESSAGES[:2] if prompt_only else MESSAGES
    plain = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (tiny / "chat_template.jinja").read_text(encoding="utf-8")
    )
    text = template.render(messages=messages, add_generation_prompt=prompt_only)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt_only)
    assert text.startswith("<|system|>Be brief.<|end|><|user|>sort DACB")
    assert text.endswith("<|assistant|>" if prompt_only else "<|assistant|>ABCD<|end|>")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt_only, return_dict=False)
    assert plain.encode(text, add_special_tokens=False).ids == ids == tokenizer(text)["input_ids"]


def test_training_rows_are_what_the_template_writes(tokenizer):
    """The prompt written in training is the one a user of the template will write."""
    row = Row("sort DACB", "ABCD", "sort")
    token_ids_BT, mask_BT, labels_BT = collate(tokenizer, [row, Row("double DACB", "DDAACCBB", "double")])
    chat = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}]
    written = tokenizer.apply_chat_template(chat, return_dict=False)
    assert token_ids_BT[0][mask_BT[0].bool()].tolist() == written
    assert tokenizer.decode(labels_BT[0][labels_BT[0] != IGNORED]) == "ABCD<|end|>"
    assert (token_ids_BT[0][~mask_BT[0].bool()] == tokenizer.pad_token_id).all()


def test_loss_is_the_mean_over_labelled_tokens(tiny, tokenizer):
    """Against transformers' own loss, which computes the logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    token_ids_BT, mask_BT, labels_BT = collate(
        tokenizer, [Row("sort DACB", "ABCD", ""), Row("last DAC", "C", "")]
    )
    with torch.no_grad():
        ours = mean_loss(model, (token_ids_BT, mask_BT, labels_BT))
        theirs = model(input_ids=token_ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_greedy_check_agrees_with_generation(tiny, tokenizer):
    """Of two rows only the one drilled into the model is right, and it is what `generate` writes."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    drilled, strange = Row("sort DACB", "ABCD", ""), Row("sort DACB", "ABCE", "")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        mean_loss(model, collate(tokenizer, [drilled])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert greedy_correct(model.eval(), tokenizer, [drilled, strange]) == [True, False]
    prompt = tokenizer("<|user|>sort DACB<|end|><|assistant|>", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "ABCD<|end|>"


def test_same_seed_same_weights():
    recipe = replace(RECIPES["dense"], **TINY)
    tokenizer = train_tokenizer(["sort copy", "DACB"], 300)
    first, second, other = (new_model(recipe, tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_learning_rate_rises_then_falls_along_a_cosine():
    recipe = replace(
        RECIPES["moe"], steps=1100, warmup_steps=100, peak_learning_rate=3e-3, final_learning_rate=1e-3
    )
    assert learning_rate(recipe, 49) == pytest.approx(1.5e-3)
    assert learning_rate(recipe, 100) == pytest.approx(3e-3)
    assert learning_rate(recipe, 600) == pytest.approx(2e-3)
    assert learning_rate(recipe, 1100) == pytest.approx(1e-3)


def test_models_have_one_to_three_million_parameters():
    tokenizer = train_tokenizer(["sort"], 300)
    tokenizer.add_tokens([f"<|{i}|>" for i in range(1024 - len(tokenizer))])
    for recipe in RECIPES.values():
        model = new_model(recipe, tokenizer, seed=0)
        assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
