"""What decides a playground model: sizes, optimisation and the mixture it is pre-trained on."""

from __future__ import annotations

from dataclasses import dataclass

from modeseek_ray.errors import ModelError

VOCABULARY_SIZE = 1024
MAX_POSITIONS = 1024
HELD_OUT_ACCURACY = 0.9  # a skill below it is not shipped: what was never held cannot be forgotten


@dataclass(frozen=True)
class Recipe:
    """A model of 1 to 3 million parameters and how it is trained, in float32.

    Head size 32 and hidden size 128 are sizes that vLLM's CPU kernels accept.
    """

    name: str
    num_layers: int
    intermediate_size: int  # of the dense MLP, or of each expert
    num_experts: int = 0  # 0 = dense
    experts_per_token: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    steps: int = 1000
    chat_rows: int = 96  # rows of each step: skills and facts
    text_rows: int = 12  # rows of each step: running text
    text_length: int = 64  # tokens of each text row
    text_weight: float = 0.3  # of the text loss beside the loss on answers, both means per token
    peak_learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    router_coefficient: float = 0.01  # of the load-balancing loss (Shazeer et al. 2017)


RECIPES = {
    "moe": Recipe(name="moe", num_layers=3, intermediate_size=96, num_experts=8),
    "dense": Recipe(name="dense", num_layers=4, intermediate_size=512, steps=800),
}


def recipe_of(name: str) -> Recipe:
    """The recipe called `name`. Raises `ModelError` naming the known ones."""
    if name not in RECIPES:
        known, in_a_job = ", ".join(RECIPES), ", ".join(f"playground/{each}" for each in RECIPES)
        raise ModelError(
            f"there is no playground model {name!r}.",
            mend=f"Choose one of: {known}; in a job, {in_a_job}.",
            param="model",
        )
    return RECIPES[name]
