"""Pre-training from scratch, and measuring what was learnt.

Each step draws fresh rows of skills and facts (loss on the answer alone) and a block of running
text (loss on every token). Nothing depends on the clock: the same recipe and seed make the same
model on the same machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from modeseek_ray.playground import corpus
from modeseek_ray.playground.facts import facts
from modeseek_ray.playground.mixture import Row, draw_row
from modeseek_ray.playground.recipe import Recipe
from modeseek_ray.playground.skills import SKILLS, draw_input

IGNORED = -100  # label of a token that is not trained on

# B rows, T tokens; each is [B, T]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # token ids, attention mask, labels


def collate(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> Batch:
    """Right-padded chat rows, labels on the answer and its end token."""
    prompts = [f"<|user|>{row.question}<|end|><|assistant|>" for row in rows]
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = tokenizer([f"{row.answer}<|end|>" for row in rows])["input_ids"]
    longest = max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True))
    token_ids_BT = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    for i, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        end = len(prompt) + len(answer)
        token_ids_BT[i, :end] = torch.tensor(prompt + answer)
        mask_BT[i, :end] = 1
        labels_BT[i, len(prompt) : end] = torch.tensor(answer)
    return token_ids_BT, mask_BT, labels_BT


def text_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> torch.Tensor:
    """All documents as one long sequence of token ids, an end token after each."""
    ids = tokenizer([f"{document}<|end|>" for document in documents])["input_ids"]
    return torch.tensor([token for document in ids for token in document])


def text_blocks(stream: torch.Tensor, recipe: Recipe, rng: random.Random) -> Iterator[Batch]:
    """Endless random windows of the text."""
    T = recipe.text_length
    while True:
        starts = [rng.randrange(len(stream) - T) for _ in range(recipe.text_rows)]
        token_ids_BT = torch.stack([stream[s : s + T] for s in starts])
        yield token_ids_BT, torch.ones_like(token_ids_BT), token_ids_BT


def mean_loss(model: PreTrainedModel, batch: Batch, router_coefficient: float = 0.0) -> torch.Tensor:
    """Cross-entropy per labelled token, and the load-balancing loss of an MoE; logits of labelled tokens only."""
    token_ids_BT, mask_BT, labels_BT = batch
    is_moe = getattr(model.config, "num_experts", 0) > 0
    extra = {"output_router_logits": True} if is_moe and router_coefficient > 0 else {}
    output = model.model(input_ids=token_ids_BT, attention_mask=mask_BT, **extra)
    wanted = labels_BT[:, 1:] != IGNORED
    logits = model.lm_head(output.last_hidden_state[:, :-1][wanted])
    loss = F.cross_entropy(logits, labels_BT[:, 1:][wanted])
    if extra:
        config = model.config
        loss = loss + router_coefficient * load_balancing_loss_func(
            output.router_logits, config.num_experts, config.num_experts_per_tok, mask_BT
        )
    return loss


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    low, high = recipe.final_learning_rate, recipe.peak_learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def new_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98), fused=True)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    seed: int,
    on_step: Callable[[int, float, float], None],
) -> None:
    """Train in place. `on_step(step, answer_loss, text_loss)` is called after every step."""
    rng = random.Random(seed)
    texts = text_blocks(text_stream(tokenizer, corpus.training_documents()), recipe, rng)
    optimizer = new_optimizer(model, recipe)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        rows = [draw_row(rng) for _ in range(recipe.chat_rows)]
        answer_loss = mean_loss(model, collate(tokenizer, rows), recipe.router_coefficient)
        answer_loss.backward()
        text_loss = mean_loss(model, next(texts), recipe.router_coefficient)
        (recipe.text_weight * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step, answer_loss.item(), text_loss.item())
    model.eval()


@torch.no_grad()
def greedy_correct(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> list[bool]:
    """Whether greedy decoding would write each answer.

    It does exactly when every token of the answer is the argmax given those before it, so one
    forward pass decides and nothing is generated.
    """
    token_ids_BT, mask_BT, labels_BT = collate(tokenizer, rows)
    hidden = model.model(input_ids=token_ids_BT, attention_mask=mask_BT).last_hidden_state
    best_BT = model.lm_head(hidden[:, :-1]).argmax(-1)
    wanted = labels_BT[:, 1:]
    return ((best_BT == wanted) | (wanted == IGNORED)).all(-1).tolist()


def held_out_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, rows_per_task: int = 200
) -> dict[str, float]:
    """Greedy accuracy by skill on inputs never trained on, and of the facts on the trained questions."""
    rng = random.Random("held-out accuracy")
    by_task = {
        skill.name: [
            Row(skill.question(given), skill.answer(given), skill.name)
            for given in (draw_input(skill, rng, held_out=True) for _ in range(rows_per_task))
        ]
        for skill in SKILLS
    }
    by_task["facts"] = [Row(question, answer, "facts") for question, answer in facts()]
    return {
        task: sum(correct) / len(correct)
        for task, rows in by_task.items()
        for correct in [greedy_correct(model, tokenizer, rows)]
    }


@torch.no_grad()
def held_out_text_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, num_blocks: int = 64
) -> float:
    """Nats per token on text never trained on, in windows of 128 tokens."""
    stream = text_stream(tokenizer, corpus.held_out_documents())[: num_blocks * 128]
    blocks = stream[: len(stream) // 128 * 128].view(-1, 128)
    return mean_loss(model, (blocks, torch.ones_like(blocks), blocks)).item()
