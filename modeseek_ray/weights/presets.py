"""Methods by the literature's names: each a short composition of f, g, c and KL, never a code path.

A preset fills what the user did not set. `source` says where it comes from, `checked` what of that was read
line by line against this code (a paper's own text where its code is not released), `differs` how it departs.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Preset:
    """Fields of `Weighting`, where they come from, what was compared, and what differs."""

    what: str
    fields: Mapping[str, Any]
    source: str
    checked: str
    differs: str


_ESS = {"ess": {"floor": 0.3, "max": 1.0, "warmup": 0.1}}
_RAW = {"normalise": False}

PRESETS: dict[str, Preset] = {
    "sft": Preset(
        "every row counts by its prior",
        {},
        source="maximum likelihood",
        checked="the trainer's ordinary step, bit for bit",
        differs="nothing",
    ),
    "mode_seeking": Preset(
        "likelihood ratio against the frozen start, tempered by ESS",
        {"likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": _ESS}},
        source="mode-seeking SFT, softmax(gamma log w) over the batch",
        checked="the listing softmax(gamma log w) times summed log-probabilities: same weights, parallel gradient",
        differs="ratio per token (length_exponent 1), cap at 10, mean-one weights; measured here"
        " (tests/bench/forgetting/RESULTS.md): it kept no more of the old tasks than plain SFT; anchored kept far more",
    ),
    "anchored": Preset(
        "the ratio turned round: at gamma 1 the geometric mean of data and start",
        {"likelihood": {"scheme": "ratio_power", "of": "initial_over_policy", "gamma": _ESS}},
        source="modeseek-ray, METHODS section 2",
        checked="its closed form, by enumeration",
        differs="gamma by ESS up to 1; set gamma: 1.0 for the exact geometric mean",
    ),
    "flow": Preset(
        "static: rows the start finds likely count more",
        {
            "likelihood": {"scheme": "ratio_power", "of": "initial", "gamma": {"inverse_median_nll": {}}},
            **_RAW,
        },
        source="FLOW: exp(-loss_i / median loss) under the start, not normalised",
        checked="code (sanyalsunny111/FLOW_finetuning): exp(-mean loss / the data set's median), over tokens",
        differs="nothing; in an online job, which has no data set, the median is the batch's",
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
        checked="code (emmyqin/iw_sft): exp(mean log pi/pi_0) clipped to [0, 16], temp 1, over tokens",
        differs="nothing",
    ),
    "dft": Preset(
        "each token by its own probability",
        {"token": {"scheme": "dft", "gamma": 1.0}},
        source="dynamic fine-tuning, 2508.05629",
        checked="code (yongliang-wu/DFT, TRL 1.16, LLaMA-Factory): loss times detached p, over tokens",
        differs="nothing; exponents by kind of token, which its code gained later, are not here",
    ),
    "asft": Preset(
        "dft held near the start by a forward KL",
        {"token": {"scheme": "dft", "gamma": 1.0}, "kl": {"direction": "forward", "coefficient": 0.05}},
        source="anchored SFT, 2509.23753, and its code (forward KL by exact vocabulary sum)",
        checked="code (zhuchichi56/ASFT, LLaMA-Factory): dft + coefficient x KL(pi_0 || pi), exact, over tokens",
        differs="the coefficient is that of its README's example; its script defaults to 0.1",
    ),
    "psft": Preset(
        "token ratio against the inner loop's start, clipped above",
        {"token": {"scheme": "psft", "clip": 0.28}},
        source="proximal SFT, 2508.17784 (batch 64 in mini-batches of 8)",
        checked="code (zwhong714/PSFT): PPO's clipped loss with every advantage 1, so only the upper clip, .28, binds",
        differs="nothing; needs several inner steps, with one it is SFT",
    ),
    "eaft": Preset(
        "each token by the entropy of the policy's top 20",
        {"token": {"scheme": "eaft", "alpha": 1.0}},
        source="entropy-adaptive fine-tuning, 2601.02151, and its code in LLaMA-Factory",
        checked="code (LLaMA-Factory): softmax over the top 20, (H / 3)^alpha",
        differs="H is divided by ln 20 = 2.9957, there by 3",
    ),
    "infosft": Preset(
        "tokens of middling probability count most",
        {"token": {"scheme": "infosft", "threshold": 0.93}},
        source="InfoSFT, 2605.14967: p (C - logit p)",
        checked="code (Helloworld10011/InfoSFT, normalised loss): p relu(1 - logit p / logit P), over tokens",
        differs="nothing in the weight; P is 0.93 unless given",
    ),
    "talr": Preset(
        "hard tokens count less, by a temperature that follows the loss",
        {"token": {"scheme": "talr", "floor": 0.01}},
        source="token-adaptive loss reweighting, 2509.20758",
        checked="another paper's code of it (shankarp8/distillation-retains-capabilities): max(p^(1/tau), .01), tau the"
        " batch's median of the sequences' mean loss, over tokens. Its own code is not released, its text was not read",
        differs="nothing known; tau is of the global batch, there of a micro-batch",
    ),
    "rwr": Preset(
        "exponential of the reward",
        {"reward": {"scheme": "exponential", "beta": 1.0}},
        source="reward-weighted regression, Peters & Schaal 2007",
        checked="its closed form; neither paper nor code was read",
        differs="beta is given, not adapted by EM; normalised within each prompt",
    ),
    "awr": Preset(
        "exponential of the standardised advantage, clipped at 20",
        {"reward": {"scheme": "advantage", "clip": 20.0}},
        source="advantage-weighted regression, Peng et al. 2019",
        checked="code (xbpeng/awr): exp of the advantage, standardised over the batch, clipped at 20",
        differs="the baseline is the prompt's mean reward, not a learnt value; standardised within the prompt",
    ),
    "raft": Preset(
        "the best sample of each prompt",
        {"reward": {"scheme": "top_k", "share": 1e-6, "ties": "first", "scope": "group"}},
        source="RAFT, Dong et al. 2023",
        checked="code (OptimalScale/LMFlow): the best share of one answer to each of many prompts",
        differs="ranks within each prompt, that code over all prompts; share 1e-6 keeps one",
    ),
    "top_k": Preset(
        "the best quarter of each prompt's samples",
        {"reward": {"scheme": "top_k", "share": 0.25, "ties": "keep_all"}},
        source="top-K SFT",
        checked="its closed form",
        differs="K as a share; ties at the boundary are kept",
    ),
    "bon": Preset(
        "what best-of-N would pick",
        {"reward": {"scheme": "best_of_n", "n": 2, "scope": "group"}},
        source="best-of-N distillation",
        checked="its closed form, and by enumeration",
        differs="closed form from the ranks of n >= N samples; no second sampling",
    ),
    "iterative": Preset(
        "one round of variational fitting: the start, tilted by the reward, from another sampler's data",
        {
            "likelihood": {
                "scheme": "ratio_power",
                "of": "round_over_data",
                "length_exponent": 0.0,
                "gamma": 1.0,
            },
            "reward": {"scheme": "exponential", "beta": 1.0},
        },
        source="iterated variational fitting, METHODS section 3: weight (pi_k/mu) e^(r/beta)",
        checked="its closed form, by enumeration: rounds at K beta equal one at beta",
        differs="cap at 10; one round, `rounds` asks for more",
    ),
    "dpo": Preset(
        "each prompt's best answer up, its worst down, by how little the policy tells them apart",
        {"reward": {"scheme": "preference", "beta": 0.1, "scope": "group"}},
        source="direct preference optimisation, 2305.18290",
        checked="code (TRL 1.16): the same loss on the same log-probabilities",
        differs="nothing with two answers a prompt; of more, the best and the worst make the pair",
    ),
    "grpo": Preset(
        "signed, standardised advantage",
        {"reward": {"scheme": "signed_advantage", "divide_by_std": True, "scope": "group"}},
        source="GRPO, 2402.03300",
        checked="code (TRL 1.16): reward minus group mean, over group deviation",
        differs="population deviation and 1e-8, there the sample deviation and 1e-4; clipping and KL are set beside it",
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
