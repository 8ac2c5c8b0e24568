"""Answers drawn from a small model at temperature one: the base's own, and an online run's rounds.

B  prompts of one length      T  tokens written so far
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 12  # tokens of an answer: three letters with dashes and the end token are six


@torch.no_grad()
def sample_answers(
    model: Any, prompts: Sequence[Sequence[int]], end_id: int, *, generator: torch.Generator
) -> tuple[list[list[int]], list[list[float]]]:
    """An answer to each prompt, end token included where one was written, and its tokens' log-probabilities.

    `model` is a transformers causal LM, `generator` on its device. Prompts of one length go through together,
    with a cache.
    """
    was_training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        prompt_BS = torch.tensor([list(prompts[i]) for i in chosen], device=model.device)
        token_BT, log_prob_BT = _write(model, prompt_BS, end_id, generator)
        for i, tokens, values in zip(chosen, token_BT.tolist(), log_prob_BT.tolist(), strict=True):
            stop = tokens.index(end_id) + 1 if end_id in tokens else len(tokens)
            answers[i], log_probs[i] = tokens[:stop], values[:stop]
    model.train(was_training)
    return answers, log_probs


def _write(model: Any, prompt_BS: Tensor, end_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[B, T] tokens and log-probabilities; what follows an end token means nothing."""
    ids, cache = prompt_BS, None
    ended_B = torch.zeros(len(prompt_BS), dtype=torch.bool, device=prompt_BS.device)
    tokens, log_probs = [], []
    for _ in range(LONGEST):
        output = model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_prob_BV = model.lm_head(output.last_hidden_state[:, -1]).float().log_softmax(-1)
        ids = torch.multinomial(log_prob_BV.exp(), 1, generator=generator)
        tokens.append(ids)
        log_probs.append(log_prob_BV.gather(1, ids))
        ended_B |= ids[:, 0] == end_id
        if bool(ended_B.all()):
            break
    return torch.cat(tokens, 1), torch.cat(log_probs, 1)
