"""The methods compared, with their grids: PROTOCOL.md's table as code.

Ten trials each. The first five go through all five learning rates, so that a study cut short after them has
still tuned the rate of every method; the middle of the grid comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.bench.forgetting.train import Setting

FIVE_RATES = (3e-4, 6e-4, 1.2e-3, 2.5e-3, 5e-3)
BETWEEN = (2e-4, 4.5e-4, 9e-4, 1.7e-3, 3.5e-3)
MIDDLE_FIRST = (2, 1, 3, 0, 4)
LORA_FACTOR = 5.0
CHECKPOINT = Setting({}, 1.2e-3)  # the SFT run whose likelihoods stand for the data


@dataclass(frozen=True)
class Method:
    """A name, what it does in a few words, and its trials in the order they are run."""

    name: str
    what: str
    trials: tuple[Setting, ...]
    control: str | None = None  # the method with the same weights on the wrong rows


def _alone(name: str, what: str, setting: Setting) -> Method:
    """No hyper-parameter of its own: ten learning rates."""
    rates = [FIVE_RATES[i] for i in MIDDLE_FIRST] + [BETWEEN[i] for i in MIDDLE_FIRST]
    return Method(name, what, tuple(replace(setting, learning_rate=rate) for rate in rates))


def _with_own(
    name: str,
    what: str,
    make: Callable[[Any], Setting],
    values: Sequence[Any],
    *,
    factor: float = 1.0,
    control: str | None = None,
) -> Method:
    """Five learning rates times two values of its own."""
    first = [(MIDDLE_FIRST[k], values[k % 2]) for k in range(5)]
    second = [(MIDDLE_FIRST[k], values[(k + 1) % 2]) for k in range(5)]
    trials = tuple(replace(make(value), learning_rate=factor * FIVE_RATES[i]) for i, value in first + second)
    return Method(name, what, trials, control)


def _ratio(of: str, gamma: Any) -> dict[str, Any]:
    return {"likelihood": {"scheme": "ratio_power", "of": of, "gamma": gamma}}


def _ess(of: str) -> Callable[[float], Setting]:
    return lambda floor: Setting(_ratio(of, {"ess": {"floor": floor, "max": 1.0, "warmup": 0.1}}), 0.0)


def _shuffled(of: str) -> Callable[[float], Setting]:
    return lambda floor: replace(_ess(of)(floor), shuffled=True)


def _kl(direction: str) -> Callable[[float], Setting]:
    return lambda coefficient: Setting({"kl": {"direction": direction, "coefficient": coefficient}}, 0.0)


def _preset(name: str, section: str, field: str) -> Callable[[Any], Setting]:
    return lambda value: Setting({"preset": name, section: {field: value}}, 0.0)


def _reward(scheme: str, field: str) -> Callable[[Any], Setting]:
    return lambda value: Setting({"reward": {"scheme": scheme, field: value, "scope": "group"}}, 0.0)


def _online(divide_by_std: bool) -> Setting:
    reward = {"scheme": "signed_advantage", "divide_by_std": divide_by_std, "scope": "group"}
    return Setting({"preset": "grpo", "reward": reward}, 0.0, online=True)


DEMONSTRATIONS: tuple[Method, ...] = (
    _alone("sft", "plain supervised fine-tuning", Setting({}, 0.0)),
    _with_own("sft_kl_forward", "SFT + forward KL to the start on the batch", _kl("forward"), (0.1, 1.0)),
    _with_own("sft_kl_reverse", "SFT + reverse KL to the start on the batch", _kl("reverse"), (0.1, 1.0)),
    _with_own(
        "replay", "2 of 32 rows from the old mixture", lambda v: Setting({}, 0.0, replay_prior=v), (1.0, 4.0)
    ),
    _with_own(
        "lora",
        "adapters on attention",
        lambda rank: Setting({}, 0.0, lora_rank=rank),
        (4, 16),
        factor=LORA_FACTOR,
    ),
    _with_own(
        "mode_seeking",
        "policy over frozen start, γ by ESS (the preset)",
        _ess("policy_over_initial"),
        (0.3, 0.6),
        control="shuffled_mode_seeking",
    ),
    _with_own(
        "mode_seeking_fixed",
        "policy over frozen start, fixed γ",
        lambda gamma: Setting(_ratio("policy_over_initial", gamma), 0.0),
        (0.3, 0.7),
    ),
    _with_own(
        "mode_seeking_data",
        "policy over an SFT checkpoint of the data, fixed γ",
        lambda gamma: Setting(_ratio("policy_over_data", gamma), 0.0, data_reference=True),
        (0.3, 0.7),
    ),
    _with_own(
        "anchored",
        "start over policy, γ by ESS (the preset)",
        _ess("initial_over_policy"),
        (0.3, 0.6),
        control="shuffled_anchored",
    ),
    _with_own(
        "flow",
        "rows the start finds likely, static",
        lambda share: Setting({"preset": "flow"}, 0.0, flow_share=share),
        (1.0, 0.5),
    ),
    _with_own(
        "shuffled_mode_seeking",
        "control: mode_seeking's weights on the wrong rows",
        _shuffled("policy_over_initial"),
        (0.3, 0.6),
    ),
    _with_own(
        "shuffled_anchored",
        "control: anchored's weights on the wrong rows",
        _shuffled("initial_over_policy"),
        (0.3, 0.6),
    ),
    _with_own("dft", "tokens by their own probability", _preset("dft", "token", "gamma"), (1.0, 0.5)),
    _with_own(
        "asft",
        "dft + forward KL",
        lambda c: Setting({"preset": "asft", "kl": {"direction": "forward", "coefficient": c}}, 0.0),
        (0.05, 0.5),
    ),
    _with_own(
        "psft",
        "token ratio to the inner loop's start, clipped",
        lambda at_once: Setting({"preset": "psft"}, 0.0, batches_at_once=at_once),
        (4, 8),
    ),
    _with_own("eaft", "tokens by the policy's entropy", _preset("eaft", "token", "alpha"), (1.0, 0.5)),
    _with_own(
        "infosft", "tokens of middling probability", _preset("infosft", "token", "threshold"), (0.93, 0.8)
    ),
    _with_own(
        "iw_sft",
        "the clipped ratio to the start itself",
        lambda high: Setting({"preset": "iw_sft", "likelihood": {"clip": [0.0, high]}}, 0.0),
        (16.0, 2.0),
    ),
)

SAMPLES: tuple[Method, ...] = (
    _alone(
        "rejection",
        "SFT on the samples of reward 1",
        Setting({"reward": {"scheme": "threshold", "threshold": 1.0}}, 0.0),
    ),
    _with_own("rwr", "exponential of the reward", _reward("exponential", "beta"), (0.1, 0.3)),
    _with_own("bon", "what best-of-N would pick", _reward("best_of_n", "n"), (4, 8)),
    _with_own("top_k", "the best share of each prompt's samples", _reward("top_k", "share"), (0.125, 0.25)),
    _with_own("online", "own samples, signed advantages (grpo)", _online, (False, True)),
)


def methods_of(variant: str) -> Mapping[str, Method]:
    """By name, in the order of the tables."""
    return {method.name: method for method in (SAMPLES if variant == "rewards" else DEMONSTRATIONS)}


def baseline_of(variant: str) -> str:
    """What the differences are to."""
    return "rejection" if variant == "rewards" else "sft"
