"""How much each sample counts: f(ratio) x g(reward) x prior, tempered, normalised, guarded. Numpy only.

Start at `weigh.py`, which is the order of operations; a scheme is a function in `likelihood.py` or
`reward.py` and one line in `registry.py`.
"""

from modeseek_ray.types import Evidence, Weights
from modeseek_ray.weights.checks import Facts, Problem, check_weighting
from modeseek_ray.weights.control import kl_coefficient
from modeseek_ray.weights.first_order import FirstOrderSolution, best_of_each, first_order_solver
from modeseek_ray.weights.presets import PRESETS, preset_fields
from modeseek_ray.weights.solve import effective_sample_size
from modeseek_ray.weights.steering import PromptLedger, draw_prompts, prompt_probabilities
from modeseek_ray.weights.weigh import observe, weigh
from modeseek_ray.weights.weighting import (
    Guards,
    Weighting,
    first_order_ratio,
    needs,
    resolve,
    uses_likelihood,
)

__all__ = [
    "PRESETS",
    "Evidence",
    "Facts",
    "FirstOrderSolution",
    "Guards",
    "Problem",
    "PromptLedger",
    "Weighting",
    "Weights",
    "best_of_each",
    "check_weighting",
    "draw_prompts",
    "effective_sample_size",
    "first_order_ratio",
    "first_order_solver",
    "kl_coefficient",
    "needs",
    "observe",
    "preset_fields",
    "prompt_probabilities",
    "resolve",
    "uses_likelihood",
    "weigh",
]
