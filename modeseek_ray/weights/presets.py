"""Methods by the literature's names: each a short composition of f, g, c and KL, never a code path.

A preset fills what the user did not set. `source` and `differs` say where it comes from and how it
departs from the published method.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Preset:
    """Fields of `Weighting`, where they come from, and what differs."""

    what: str
    fields: Mapping[str, Any]
    source: str
    differs: str


_ESS = {"ess": {"floor": 0.3, "max": 1.0, "warmup": 0.1}}
_RAW = {"normalise": False}

PRESETS: dict[str, Preset] = {
    "sft": Preset(
        "every row counts by its prior",
        {},
        source="maximum likelihood",
        differs="nothing",
    ),
    "mode_seeking": Preset(
        "likelihood ratio against the frozen start, tempered by ESS",
        {"likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": _ESS}},
        source="mode-seeking SFT, softmax(gamma log w) over the batch",
        differs="ratio per token (length_exponent 1), cap at 10, mean-one weights",
    ),
    "anchored": Preset(
        "the ratio turned round: at gamma 1 the geometric mean of data and start",
        {"likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": _ESS}},
        source="modeseek-ray, METHODS section 2",
        differs="gamma by ESS up to 1; set gamma: 1.0 for the exact geometric mean",
    ),
    "flow": Preset(
        "static: rows the start finds likely count more",
        {
            "likelihood": {"scheme": "ratio_power", "of": "initial", "gamma": {"inverse_median_nll": {}}},
            **_RAW,
        },
        source="FLOW: exp(-loss_i / median loss) under the start, not normalised",
        differs="the median is of the data set's rows, or of the batch until the job has measured it",
    ),
    "iw_sft": Preset(
        "importance-weighted SFT: the ratio itself, clipped",
        {
            "likelihood": {
                "scheme": "ratio_power",
                "of": "policy_over_initial",
                "length_exponent": 1.0,
                "gamma": 1.0,
                "clip": [0.0, 16.0],
            },
            **_RAW,
        },
        source="iw-SFT, Qin & Springenberg 2025, and its code (temp 1, ratio per token, clip [0, 16])",
        differs="nothing in the weight; the reference stays the frozen start",
    ),
    "dft": Preset(
        "each token by its own probability",
        {"token": {"scheme": "dft", "gamma": 1.0}},
        source="dynamic fine-tuning, 2508.05629",
        differs="nothing",
    ),
    "asft": Preset(
        "dft held near the start by a forward KL",
        {"token": {"scheme": "dft", "gamma": 1.0}, "kl": {"direction": "forward", "coefficient": 0.05}},
        source="anchored SFT, 2509.23753, and its code (forward KL by exact vocabulary sum)",
        differs="the coefficient; its training script defaults to 0.1",
    ),
    "psft": Preset(
        "token ratio against the inner loop's start, clipped above",
        {"token": {"scheme": "psft", "clip": 0.28}},
        source="proximal SFT, 2508.17784 (batch 64 in mini-batches of 8)",
        differs="nothing; needs several inner steps, with one it is SFT",
    ),
    "eaft": Preset(
        "each token by the entropy of the policy's top 20",
        {"token": {"scheme": "eaft", "alpha": 1.0}},
        source="entropy-adaptive fine-tuning, 2601.02151, and its code in LLaMA-Factory",
        differs="H is divided by ln 20 = 2.9957, there by 3",
    ),
    "infosft": Preset(
        "tokens of middling probability count most",
        {"token": {"scheme": "infosft", "threshold": 0.93}},
        source="InfoSFT, 2605.14967: p (C - logit p)",
        differs="divided by C = logit 0.93, and zero where it would be negative",
    ),
    "rwr": Preset(
        "exponential of the reward",
        {"reward": {"scheme": "exponential", "beta": 1.0}},
        source="reward-weighted regression, Peters & Schaal 2007",
        differs="beta is given, not adapted by EM; normalised within each prompt",
    ),
    "awr": Preset(
        "exponential of the standardised advantage, clipped at 20",
        {"reward": {"scheme": "advantage", "clip": 20.0}},
        source="advantage-weighted regression, Peng et al. 2019",
        differs="the baseline is the prompt's mean reward, not a learnt value",
    ),
    "raft": Preset(
        "the best sample of each prompt",
        {"reward": {"scheme": "top_k", "share": 1e-6, "ties": "first", "scope": "group"}},
        source="RAFT, Dong et al. 2023",
        differs="nothing; share 1e-6 keeps one",
    ),
    "top_k": Preset(
        "the best quarter of each prompt's samples",
        {"reward": {"scheme": "top_k", "share": 0.25, "ties": "keep_all"}},
        source="top-K SFT",
        differs="K as a share; ties at the boundary are kept",
    ),
    "bon": Preset(
        "what best-of-N would pick",
        {"reward": {"scheme": "best_of_n", "n": 2, "scope": "group"}},
        source="best-of-N distillation",
        differs="closed form from the ranks of n >= N samples; no second sampling",
    ),
    "dpo": Preset(
        "each prompt's best answer up, its worst down, by how little the policy tells them apart",
        {"reward": {"scheme": "preference", "beta": 0.1, "scope": "group"}},
        source="direct preference optimisation, 2305.18290",
        differs="nothing with two answers a prompt; of more, the best and the worst make the pair",
    ),
    "grpo": Preset(
        "signed, standardised advantage",
        {"reward": {"scheme": "signed_advantage", "divide_by_std": True, "scope": "group"}},
        source="GRPO, 2402.03300",
        differs="token ratio clipping and KL are set beside it, not here",
    ),
}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields a preset stands for, as the user would write them. Raises `KeyError`.

    >>> preset_fields("dft")
    {'token': {'scheme': 'dft', 'gamma': 1.0}}
    """
    return deepcopy(dict(PRESETS[name].fields))


def fill(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay what the user gave over the preset: field by field where the scheme is the same."""
    filled = preset_fields(name)
    for field, value in given.items():
        below = filled.get(field)
        if not isinstance(below, dict) or not isinstance(value, Mapping | BaseModel):
            filled[field] = value
            continue
        above = _as_written(value) if isinstance(value, BaseModel) else value
        same = above.get("scheme", below.get("scheme")) == below.get("scheme")
        filled[field] = {**below, **above} if same else value
    return filled


def _as_written(section: BaseModel) -> dict[str, Any]:
    """The fields that were set in a section, and which scheme it is."""
    scheme = getattr(section, "scheme", None)
    return {**({} if scheme is None else {"scheme": scheme}), **section.model_dump(exclude_unset=True)}
