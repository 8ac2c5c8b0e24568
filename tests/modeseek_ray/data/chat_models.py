"""Model directories without weights: a small byte-level BPE tokenizer and chat templates of the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXT = "sort the letters of these words please and answer the user hello world good morning " * 5

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Begins with bos, trims contents and has no generation prompt of its own (as Llama 2 and Mistral).
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' }}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Writes an empty thought before the last answer only (as Qwen3): the answer's rendering depends on its place.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "thinking": THINKING}


def without_generation_blocks(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def build_tokenizer(merges: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + len(SPECIAL) + (120 if merges else 0)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def write_model(
    directory: Path, template: str | None = CHATML, tokenizer: Tokenizer | None = None, **settings: Any
) -> Path:
    """What `ChatTokenizer` reads of a model: everything but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<|endoftext|>", **settings}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{k: v for k, v in names.items() if v is not None},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    size = tokenizer.get_vocab_size()
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "vocab_size": size}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory
