"""`"auto"`: what is picked for a job that does not say, from the data's and the model's size.

Every pick is a number in `ResolvedTraining` and a sentence that says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modeseek_ray.config import Training
from modeseek_ray.data.cursor import steps_per_epoch

# Base learning rates for AdamW by number of parameters (up to, full fine-tuning). A LoRA adapter
# takes ten times as much (Schulman et al., "LoRA Without Regret", 2025). The larger sizes are the
# rates that published fine-tuning recipes use; the smallest fits models of a few million parameters.
BASE_LEARNING_RATES: tuple[tuple[float, float], ...] = (
    (2e7, 1e-3),
    (2e8, 2e-4),
    (1e9, 5e-5),
    (4e9, 2e-5),
    (2e10, 1e-5),
    (math.inf, 5e-6),
)
LORA_FACTOR = 10.0

# Passes over the data: three, but at least 100 examples seen (up to 25 passes) and at most 25,000
# (OpenAI cookbook, "Data preparation and analysis for chat model fine-tuning").
TARGET_EPOCHS, MAX_EPOCHS = 3, 25
MIN_EXAMPLES_SEEN, MAX_EXAMPLES_SEEN = 100, 25_000
# Batch size: 0.2 % of the rows, at most 256 (OpenAI's rule), but at least 16: weights are
# normalised over the batch, and an effective sample size of a few samples says nothing.
BATCH_SHARE, MIN_BATCH, MAX_BATCH = 0.002, 16, 256
EVALUATIONS, CHECKPOINTS = 10, 4


@dataclass(frozen=True)
class ResolvedTraining:
    """`Training` with every "auto" replaced by a number."""

    epochs: int
    batch_size: int
    learning_rate: float
    total_steps: int
    warmup_steps: int
    decay: Literal["constant", "linear", "cosine"]
    evaluate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    max_steps: int | None
    replay_share: float
    aggregation: Literal["token", "sequence", "sum"]
    weight_decay: float
    max_grad_norm: float
    max_length: int | None
    truncate: bool
    async_checkpoints: bool = False


def resolve_training(
    training: Training,
    *,
    num_rows: int,
    num_parameters: int,
    has_lora: bool,
    largest_group: int = 1,
) -> tuple[ResolvedTraining, list[str]]:
    """Replace every "auto"; also say what was picked and why, one sentence each.

    `num_rows` counts training rows without replay; `largest_group` is the most rows of one prompt,
    which a batch has to hold.
    """
    messages: list[str] = []

    def pick(name: str, auto: int, why: str) -> int:
        value = getattr(training, name)
        if value != "auto":
            return int(value)
        messages.append(f"{name}: {auto}, {why}.")
        return auto

    for_rows = f"picked for {num_rows} training rows"
    epochs = pick("epochs", _auto_epochs(num_rows), for_rows)
    auto_size = auto_batch_size(num_rows, largest_group, training.replay_share)
    batch_size = pick("batch_size", auto_size, for_rows)
    learning_rate = _learning_rate(training, num_parameters, has_lora, messages)
    total_steps = epochs * steps_per_epoch(num_rows, batch_size, training.replay_share)
    if training.max_steps is not None:
        total_steps = min(total_steps, training.max_steps)
    of_steps = f"of {total_steps} steps in all"
    evaluate_every = pick("evaluate_every", math.ceil(total_steps / EVALUATIONS), of_steps)
    checkpoint_every = pick("checkpoint_every", math.ceil(total_steps / CHECKPOINTS), of_steps)
    return (
        ResolvedTraining(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            total_steps=total_steps,
            warmup_steps=math.ceil(training.warmup_share * total_steps),
            decay=training.decay,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=training.keep_checkpoints,
            async_checkpoints=training.async_checkpoints,
            max_steps=training.max_steps,
            replay_share=training.replay_share,
            aggregation=training.aggregation,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            max_length=training.max_length,
            truncate=training.truncate,
        ),
        messages,
    )


def base_learning_rate(num_parameters: int, *, has_lora: bool) -> float:
    """The rate that `learning_rate_multiplier` multiplies.

    >>> base_learning_rate(7_000_000_000, has_lora=False), base_learning_rate(7_000_000_000, has_lora=True)
    (1e-05, 0.0001)
    """
    base = next(rate for limit, rate in BASE_LEARNING_RATES if num_parameters <= limit)
    return base * LORA_FACTOR if has_lora else base


def learning_rate_at(step: int, total_steps: int, training: ResolvedTraining) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant, or falling to zero at the end.

    The first step of a warm-up over w steps takes 1/w of the peak; the last step of a decay over d
    steps takes 1/d of it (linear), so that no step is wasted at zero.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if training.decay == "linear":
        return peak * (1 - progress)
    if training.decay == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak


def _auto_epochs(num_rows: int) -> int:
    if TARGET_EPOCHS * num_rows < MIN_EXAMPLES_SEEN:
        return min(MAX_EPOCHS, math.ceil(MIN_EXAMPLES_SEEN / num_rows))
    return max(1, min(TARGET_EPOCHS, MAX_EXAMPLES_SEEN // num_rows))


def auto_batch_size(num_rows: int, largest_group: int, replay_share: float) -> int:
    """What `batch_size: auto` becomes: samples, replay included; as many as one prompt has, at least.

    >>> auto_batch_size(3, 1, 0.0), auto_batch_size(1000, 1, 0.0), auto_batch_size(3, 1, 0.25)
    (3, 16, 4)
    """
    size = min(MAX_BATCH, max(MIN_BATCH, math.ceil(BATCH_SHARE * num_rows)))
    new_rows = max(min(size, num_rows), largest_group)
    return max(min(size, num_rows), math.ceil(new_rows / (1 - replay_share)))


def _learning_rate(training: Training, num_parameters: int, has_lora: bool, messages: list[str]) -> float:
    multiplier = 1.0 if training.learning_rate_multiplier == "auto" else training.learning_rate_multiplier
    if training.learning_rate != "auto":
        if multiplier != 1.0:
            messages.append("learning_rate_multiplier is not used, because learning_rate is given.")
        return training.learning_rate
    base = base_learning_rate(num_parameters, has_lora=has_lora)
    how = "a LoRA adapter on" if has_lora else "full fine-tuning of"
    messages.append(
        f"learning_rate: {base * multiplier:g} = base {base:g} for {how} {_size(num_parameters)} parameters"
        f" x learning_rate_multiplier {multiplier:g}."
    )
    return base * multiplier


def _size(num_parameters: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if num_parameters >= factor:
            return f"{num_parameters / factor:.3g} {unit}"
    return str(num_parameters)
