"""`method.online` and its sisters: what is filled in, and what is refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest

from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.errors import ConfigError

GRADER = {
    "type": "string_check",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}


def job(kind: str, **block: Any) -> JobConfig:
    return parse_config(
        {"model": "m", "training_file": "f", "method": {"type": kind, kind: {"grader": GRADER, **block}}}
    )


def test_reinforcement_is_the_online_loop_by_openai_s_names() -> None:
    knobs = {"batch_size": 4, "compute_multiplier": 2.0, "n_epochs": 3, "eval_interval": 5}
    config = job("reinforcement", hyperparameters=knobs)
    online = config.online
    assert online is not None and online.rollout.samples_per_prompt == 16
    assert config.weighting.reward.scheme == "signed_advantage"
    assert online.effective_clip is not None and online.effective_clip.scheme == "ppo"
    training = config.training
    assert (training.batch_size, training.epochs, training.evaluate_every) == (64, 3, 5)


def test_clip_is_ppo_where_ratios_can_leave_one() -> None:
    assert job("online", preset="grpo").online.effective_clip is None  # type: ignore[union-attr]
    stale = job("online", preset="grpo", rollout={"max_staleness": 1}).online
    assert stale is not None and stale.effective_clip is not None and stale.effective_clip.high == 0.27
    off = job("online", preset="grpo", clip=None, training={"inner_steps": 2}).online
    assert off is not None and off.effective_clip is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "the grader changes nothing"),
        ({"preset": "grpo", "rollout": {"temperature": 0.0}}, "temperature is 0"),
        ({"preset": "grpo", "rollout": {"top_p": 0.9}, "clip": {}}, "top_p below 1"),
        ({"preset": "grpo", "training": {"batch_size": 8}}, "prompts_per_round"),
        ({"preset": "iterative", "rounds": 2}, "Set rounds to 1"),
        ({"preset": "grpo", "rollout": {"steer": 0.5}}, "steer goes by weights of likelihood"),
        ({"preset": "grpo", "guards": {"moving_average": 0.5}}, "all new"),
        ({"preset": "grpo", "rollout": {"max_stalenes": 1}}, "max_stalenes"),
    ],
)
def test_contradictions_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job("online", **block)


def test_a_grader_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs method.online with a grader"):
        parse_config({"model": "m", "training_file": "f", "method": {"type": "online"}})


def test_psft_needs_an_inner_loop() -> None:
    weighted = {
        "model": "m",
        "training_file": "f",
        "method": {"type": "weighted", "weighted": {"preset": "psft"}},
    }
    with pytest.raises(ConfigError, match="training.inner_steps"):
        parse_config(weighted)
    weighted["method"]["weighted"]["training"] = {"inner_steps": 8}  # type: ignore[index]
    assert parse_config(weighted).training.inner_steps == 8


def test_the_configuration_survives_a_round_trip() -> None:
    config = job("online", preset="grpo", clip={"scheme": "clamp"}, mismatch={"scheme": "tis"})
    assert parse_config(config.model_dump(mode="json", exclude_unset=True)) == config
