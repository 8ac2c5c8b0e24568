"""The work, the same for all contenders: model, prompts, reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

LEARNING_RATE = 1e-6
EXTRA_END = "~"  # the second token that ends a text of the random model
WORDS = "rivers mirror amber engines hold quiet answers under seven copper moons".split()


@dataclass(frozen=True)
class Case:
    """The work, the same for all contenders."""

    model: Literal["40m", "playground"] = "40m"
    prompts: int = 5
    samples: int = 8
    max_tokens: int = 192
    rounds: int = 2  # counted; one more goes before them
    threads: int = 2
    width: int = 512
    layers: int = 10

    @classmethod
    def of(cls, model: Literal["40m", "playground"]) -> Case:
        return cls() if model == "40m" else cls(model="playground", max_tokens=12, rounds=12)

    @property
    def samples_per_round(self) -> int:
        return self.prompts * self.samples


def build_model(case: Case, directory: Path) -> Path:
    """A random dense Qwen3 over bytes, without a trained end: `<|end|>` and one more byte end a text."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from tests.conftest import byte_tokenizer, save_tiny

    save_tiny(
        directory,
        Qwen3Config,
        Qwen3ForCausalLM,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=max(1, case.width // 128),
        head_dim=64,
        max_position_embeddings=512,
    )
    tokenizer = byte_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EXTRA_END)]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(directory)
    return directory


def model_of(case: Case, scratch: Path) -> Path:
    """The model's directory, built where it is random. Raises `RuntimeError` without the playground."""
    if case.model == "40m":
        return build_model(case, scratch / "model")
    from modeseek_ray.jobs.paths import Home
    from modeseek_ray.playground import locate

    found = locate("moe", Home.from_environment().root)
    if found is None:
        raise RuntimeError("the playground's model is not built: make playground")
    return found


def write_prompts(case: Case, path: Path) -> Path:
    """Questions for every round: texts for the random model, chats of the new task for the playground's."""
    count = case.prompts * (case.rounds + 1)
    if case.model == "playground":
        from modeseek_ray.jobs.paths import Home
        from modeseek_ray.playground import data_files

        lines = data_files(Home.from_environment().root)["new-task.prompts"].read_text().splitlines()[:count]
    else:
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(WORDS, rng.integers(3, 8))) for _ in range(count)]
        lines = [json.dumps({"prompt": f"{i}: {text}"}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def grader(case: Case) -> dict[str, Any]:
    """What `trl_reward` computes, as the product names it."""
    if case.model == "playground":
        return {
            "type": "string_check",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.reference }}",
            "operation": "eq",
        }
    return {"type": "length_penalty", "free_tokens": 0, "max_tokens": case.max_tokens}


def trl_reward(case: Case) -> Callable[..., list[float]]:
    """The same numbers as `grader`."""
    if case.model == "playground":

        def is_right(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
            texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
            return [float(text == right) for text, right in zip(texts, reference, strict=True)]

        return is_right

    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-min(len(ids) / case.max_tokens, 1.0) for ids in completion_ids]

    return short
