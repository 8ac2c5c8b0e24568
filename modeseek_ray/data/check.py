"""Checking data before anything is started: every file is read to its end, every problem counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from modeseek_ray.config import JobConfig
from modeseek_ray.data.batching import padding_share
from modeseek_ray.data.loading import read_rows, tokenise
from modeseek_ray.data.problems import Problems
from modeseek_ray.data.prompts import encode_prompt, read_prompts
from modeseek_ray.data.report import DataReport, FileReport
from modeseek_ray.data.rows import ROLES, Role
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError, Warn
from modeseek_ray.rewards import check_grader
from modeseek_ray.weights import needs


def inspect_file(
    path: Path | str,
    tokenizer: ChatTokenizer | None = None,
    *,
    role: Role = "training",
    max_length: int | None = None,
    truncate: bool = False,
    name: str | None = None,
) -> FileReport:
    """Read a file and report. Without a tokenizer everything is checked that needs none.

    `name` is what the file is called in messages (default: its path). Nothing is raised for bad
    rows: `report.problems` has them. Raises ModelError if the tokenizer has no template for chat rows.
    """
    problems = Problems(name or str(path))
    report = FileReport(problems.file, role, problems, max_length=max_length)
    rows = read_rows(path, problems, role)
    if tokenizer is None:
        for row in rows:
            report.add_row(row)
        return report
    loaded = tokenise(rows, problems, tokenizer, max_length=max_length, truncate=truncate, role=role)
    for item in loaded:
        report.add_row(item.row)
        report.add_samples(item.samples, item.num_truncated)
    return report


def inspect_prompts(
    path: Path | str,
    tokenizer: ChatTokenizer | None = None,
    *,
    max_tokens: int | None = None,
    name: str | None = None,
) -> FileReport:
    """The same for a file of questions, of at most `max_tokens` tokens each."""
    problems = Problems(name or str(path))
    report = FileReport(problems.file, "training", problems, max_length=max_tokens)
    for row in read_prompts(path, problems):
        try:
            prompt = None if tokenizer is None else encode_prompt(row, tokenizer, max_tokens)
        except DataError as error:
            problems.add(error, row.number + 1)
        else:
            report.add_prompt(row, 0 if prompt is None else len(prompt.token_ids_T))
    return report


def inspect_job(
    config: JobConfig,
    files: Mapping[str, Path],
    model_dir: Path | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> DataReport:
    """Check a job's files together with what its configuration asks of them.

    `files` maps `training_file` (or `training`), `validation_file`, … to paths, `names` likewise to
    what they are called in messages. With `model_dir`, tokens are counted and lengths checked
    against the model; without, only what needs no tokenizer. Raises ModelError if the model cannot
    be used with this data.
    """
    tokenizer = None if model_dir is None else ChatTokenizer(model_dir)
    limits = [config.training.max_length, tokenizer.max_length if tokenizer else None]
    max_length = min((limit for limit in limits if limit is not None), default=None)
    reports: dict[Role, FileReport] = {}
    for role in ROLES:
        key = next((k for k in (role, f"{role}_file") if k in files), None)
        if key is not None and role == "training" and config.rollout is not None:
            room = None if max_length is None else max_length - config.rollout.max_tokens
            reports[role] = inspect_prompts(
                files[key], tokenizer, max_tokens=room, name=(names or {}).get(key)
            )
        elif key is not None:
            report = inspect_file(
                files[key],
                tokenizer,
                role=role,
                max_length=max_length,
                truncate=config.training.truncate,
                name=(names or {}).get(key),
            )
            report.padding_share = _padding_share(report, config)
            reports[role] = report
    warnings: list[Warn] = []
    if "training" in reports:
        check = _check_training if config.rollout is None else _check_prompts
        warnings += check(config, reports["training"])
    warnings += [warn for report in reports.values() for warn in _warn_file(report)]
    return DataReport(reports, tuple(warnings))


def _check_training(config: JobConfig, report: FileReport) -> Iterator[Warn]:
    """What the method and the batches need of the training file: problems go into its report.

    What the weighting needs is said by `weighting_problems`, with the path of its field.
    """
    if report.rows == 0:
        return
    wanted = needs(config.weighting)
    is_preference = config.weighting.reward.scheme == "preference"
    if is_preference and 0 < report.rows_with_reward < report.rows:
        report.problems.add(
            DataError(
                f"{report.rows - report.rows_with_reward} rows are neither pairs nor rewarded.",
                mend="Give every row preferred_output and non_preferred_output.",
                code="not_a_pair",
            )
        )
    if report.pairs and "rewards" not in wanted:
        report.problems.add(
            DataError(
                f"{report.pairs} rows have a non_preferred_output, which this method would train on.",
                mend="Choose method.type: dpo, or send rows of `messages`.",
                code="unexpected_pairs",
            )
        )
    if report.prior_sum == 0:
        report.problems.add(
            DataError("every row has weight 0.", mend="Give some rows a weight above 0.", code="bad_weight")
        )
    batch_size = config.training.batch_size
    if batch_size != "auto" and report.largest_group > batch_size * (1 - config.training.replay_share):
        report.problems.add(
            DataError(
                f"a group of {report.largest_group} rows does not fit a batch of {batch_size}"
                " (less replay), and a group is never split.",
                mend="Raise training.batch_size.",
                code="group_too_large",
            )
        )
    if "rewards" in wanted and 0 < report.rows_with_reward < report.rows:
        without = report.rows - report.rows_with_reward
        message = f"{without} of {report.rows} training rows have no reward; their prior alone counts."
        yield Warn("some_without_reward", message)
    if "rewards" in wanted and report.has_rewards and report.smallest_reward == report.largest_reward:
        yield Warn(
            "equal_rewards", f"all rewards are {report.largest_reward}: they tell no row from another."
        )


def _check_prompts(config: JobConfig, report: FileReport) -> Iterator[Warn]:
    """What the grader reads must be there. Raises ConfigError where no row has it."""
    if report.rows == 0:
        return
    check_grader(config.grader, fields=report.item_fields, param=f"method.{config.method.type}.grader")
    if report.prior_sum == 0:
        report.problems.add(
            DataError("every row has weight 0.", mend="Give some rows a weight above 0.", code="bad_weight")
        )
    rollout = config.rollout
    if rollout is not None and report.rows < rollout.prompts_per_round:
        yield Warn(
            "few_prompts",
            f"a round takes {rollout.prompts_per_round} prompts, the file has {report.rows}: each round asks them all.",
            param=f"method.{config.method.type}.rollout.prompts_per_round",
        )


def _warn_file(report: FileReport) -> Iterator[Warn]:
    if report.truncated:
        yield Warn(
            "truncated",
            f"{report.file}: {report.truncated} samples are cut to {report.max_length} tokens.",
            param="training.truncate",
        )

    if report.role in ("validation", "retention") and report.rows and not report.graded_rows:
        yield Warn(
            "only_losses",
            f"{report.file}: no row says that its answer can be right or wrong, so only losses are measured."
            " For the share solved, give chats a `task` (any label), other rows `accept: []`.",
            param=f"{report.role}_file",
        )


def _padding_share(report: FileReport, config: JobConfig) -> float:
    training, resources = config.training, config.resources
    return padding_share(
        np.array(report.lengths, dtype=np.int64),
        batch_size=64 if training.batch_size == "auto" else training.batch_size,
        num_ranks=resources.trainer_groups,
        max_tokens=resources.micro_batch_tokens * resources.sequence_parallel,
        max_samples=resources.micro_batch_size,
    )
