"""Whether a job's weighting can do with its training file: the weighting's own checks, told the file's facts."""

from __future__ import annotations

from dataclasses import replace

from modeseek_ray.config import JobConfig, rooted
from modeseek_ray.data.auto import auto_batch_size
from modeseek_ray.data.report import FileReport
from modeseek_ray.weights.checks import Facts, Problem, check_weighting


def weighting_problems(
    config: JobConfig, training: FileReport | None, *, has_behavior: bool
) -> list[Problem]:
    """All problems, errors first, with paths of the job's own method.

    Without a report, those that need none: of the weighting itself, or of a job that writes its own samples.
    """
    facts = None
    if training is not None or config.rollout is not None:
        facts = facts_of(config, training, has_behavior=has_behavior)
    problems = check_weighting(config.weighting, facts)
    return [replace(problem, param=rooted(problem.param, config.method.type)) for problem in problems]


def refuse_impossible_weighting(config: JobConfig, training: FileReport | None = None) -> None:
    """Raise the first problem that is an error, as the `ConfigError` it is."""
    for problem in weighting_problems(config, training, has_behavior=config.behavior_model is not None):
        if problem.severity == "error":
            raise problem.error()


def facts_of(config: JobConfig, training: FileReport | None, *, has_behavior: bool) -> Facts:
    """What the weighting's own checks want to know of the data."""
    asked = config.training
    if config.rollout is not None:  # samples, their rewards and log-probabilities are made by the job
        return Facts(
            batch_size=config.rollout.samples_per_round,
            has_rewards=True,
            has_log_behavior=True,
            has_token_logprobs=True,
            samples_per_prompt=config.rollout.samples_per_prompt,
            smallest_rewarded_group=config.rollout.samples_per_prompt,
            inner_steps=config.training.inner_steps,
        )
    assert training is not None, "without rollouts there is a training file"
    num_rows = training.samples or training.rows + training.pairs
    batch_size = asked.batch_size
    if batch_size == "auto":
        batch_size = auto_batch_size(num_rows, training.largest_group, asked.replay_share)
    return Facts(
        batch_size=batch_size,
        num_rows=num_rows,
        has_rewards=training.has_rewards,
        has_log_behavior=training.has_logprobs or has_behavior,
        has_token_logprobs=training.has_token_logprobs,
        samples_per_prompt=training.largest_group,
        smallest_rewarded_group=training.smallest_rewarded_group,
        smallest_reward=training.smallest_reward if training.has_rewards else None,
        inner_steps=asked.inner_steps,
        replay_share=asked.replay_share,
    )
