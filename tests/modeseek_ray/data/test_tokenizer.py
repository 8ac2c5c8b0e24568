"""Prompts and completions, special tokens, and models that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modeseek_ray.data.rows import Chat, Completion
from modeseek_ray.data.tokenizer import ChatTokenizer, Encoded
from modeseek_ray.errors import ModelError
from tests.modeseek_ray.data.chat_models import CHATML, SPECIAL, TEXT, build_tokenizer, write_model


def trained_text(tokenizer, row) -> tuple[str, str]:
    """(everything, what is trained)"""
    (encoded,) = tokenizer.encode([row])
    return tokenizer.decode(encoded.token_ids_T), tokenizer.decode(encoded.token_ids_T[encoded.trained_T])


def test_the_completion_and_its_end_are_trained(model_tokenizer):
    whole, trained = trained_text(model_tokenizer, Completion("hello ", "world"))
    assert (whole, trained) == ("hello world<|im_end|>", "world<|im_end|>")


def test_prompt_tokens_are_those_the_model_meets_when_asked(model_tokenizer):
    # " world" is one token of the tokenizer, but the prompt ends with the space
    (encoded,) = model_tokenizer.encode([Completion("hello ", "world")])
    prompt = model_tokenizer.encode_prompt("hello ").tolist()
    assert encoded.token_ids_T[: len(prompt)].tolist() == prompt
    assert not encoded.trained_T[: len(prompt)].any() and encoded.trained_T[len(prompt) :].all()


def test_an_end_that_is_written_out_is_not_doubled(model_tokenizer):
    whole, trained = trained_text(model_tokenizer, Completion("a", "b<|im_end|>"))
    assert (whole, trained) == ("ab<|im_end|>", "b<|im_end|>")


def test_nothing_predicts_the_first_token(model_tokenizer):
    whole, trained = trained_text(model_tokenizer, Completion("", "xy"))
    assert (whole, trained) == ("xy<|im_end|>", "y<|im_end|>")


def test_a_tokenizer_that_adds_bos_and_eos_keeps_bos_alone(tmp_path):
    core = build_tokenizer()
    ids = [("<s>", core.token_to_id("<s>")), ("<|im_end|>", core.token_to_id("<|im_end|>"))]
    core.post_processor = processors.TemplateProcessing(single="<s> $A <|im_end|>", special_tokens=ids)
    tokenizer = ChatTokenizer(write_model(tmp_path, CHATML, core))
    assert trained_text(tokenizer, Completion("a", "b")) == ("<s>ab<|im_end|>", "b<|im_end|>")
    chat = Chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], [True])
    assert trained_text(tokenizer, chat)[0].startswith("<|im_start|>user")  # the template alone decides


def test_a_tokenizer_that_writes_a_space_before_each_text_is_cut_by_offsets(tmp_path):
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    core.train_from_iterator([TEXT], trainer)
    tokenizer = ChatTokenizer(write_model(tmp_path, CHATML, core))
    (encoded,) = tokenizer.encode([Completion("sort the", "letters")])
    assert isinstance(encoded, Encoded)
    pieces = [str(core.id_to_token(i)) for i in encoded.token_ids_T]
    assert "".join(pieces) == "▁sort▁theletters<|im_end|>"  # no space that nobody wrote
    trained = "".join(p for p, t in zip(pieces, encoded.trained_T, strict=True) if t)
    assert trained.endswith("letters<|im_end|>") and "sort" not in trained


def test_rows_of_both_shapes_keep_their_order(model_tokenizer):
    chat = Chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], [True])
    rows = [Completion("a", "b"), chat, Completion("c", "d"), chat]
    together = model_tokenizer.encode(rows)
    for encoded, row in zip(together, rows, strict=True):
        (alone,) = model_tokenizer.encode([row])
        assert encoded.token_ids_T.tolist() == alone.token_ids_T.tolist()
    assert model_tokenizer.encode([]) == []


def test_a_message_of_weight_0_is_not_trained(model_tokenizer):
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}]
    turns = [*turn, {"role": "user", "content": "q"}, {"role": "assistant", "content": "two"}]
    assert trained_text(model_tokenizer, Chat(turns, [False, True]))[1] == "two<|im_end|>"
    assert trained_text(model_tokenizer, Chat(turns, [True, False]))[1] == "one<|im_end|>"


def test_what_the_model_says_of_itself(model_tokenizer):
    assert model_tokenizer.max_length == 64
    assert model_tokenizer.decode([model_tokenizer.eos_token_id]) == "<|im_end|>"
    assert model_tokenizer.special_tokens["pad_token"] == "<|endoftext|>"


def test_settings_of_earlier_formats_are_read(tmp_path):
    model = write_model(tmp_path, template=None, eos_token=None, bos_token=None, pad_token=None)
    eos = {"content": "</s>", "lstrip": False}
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = ChatTokenizer(model)
    assert tokenizer.special_tokens["eos_token"] == "</s>" and tokenizer.eos_token_id is not None
    assert tokenizer.template is not None and tokenizer.template.source == CHATML


def test_the_fingerprint_changes_with_what_changes_tokens(tmp_path):
    prints = {
        ChatTokenizer(write_model(tmp_path / "a")).fingerprint,
        ChatTokenizer(write_model(tmp_path / "b", CHATML + " ")).fingerprint,
        ChatTokenizer(write_model(tmp_path / "c", tokenizer=build_tokenizer(merges=False))).fingerprint,
        ChatTokenizer(write_model(tmp_path / "d", eos_token="</s>")).fingerprint,
    }
    assert len(prints) == 4
    assert ChatTokenizer(write_model(tmp_path / "e")).fingerprint in prints


def test_models_that_cannot_be_used_say_so(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as refused:
        ChatTokenizer(tmp_path / "nowhere")
    assert refused.value.code == "no_tokenizer"
    with pytest.raises(ModelError, match="no eos_token"):
        ChatTokenizer(write_model(tmp_path / "a", eos_token=None))
    with pytest.raises(ModelError, match="no eos_token"):
        ChatTokenizer(write_model(tmp_path / "b", eos_token="<not in the vocabulary>"))
    broken = write_model(tmp_path / "c")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTokenizer(broken)
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError):
        ChatTokenizer(broken)


def test_a_model_without_a_template_still_takes_completions(tmp_path):
    tokenizer = ChatTokenizer(write_model(tmp_path, template=None))
    assert trained_text(tokenizer, Completion("a", "b"))[1] == "b<|im_end|>"
    with pytest.raises(ModelError, match="no chat template") as refused:
        tokenizer.encode([Chat([{"role": "assistant", "content": "x"}], [True])])
    assert refused.value.code == "no_chat_template"


def test_neither_torch_nor_transformers_nor_ray_is_loaded():
    code = (
        "import sys, modeseek_ray.data.check, modeseek_ray.data.dataset, modeseek_ray.data.auto;"
        "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
