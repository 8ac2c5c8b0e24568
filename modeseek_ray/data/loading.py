"""Rows to samples: tokens, masks, lengths, and the checks that need them.

One pass serves both the report (`check.py`), which wants every problem, and training
(`load_samples`), which wants the samples or the first problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeseek_ray.data.parsing import parse_records
from modeseek_ray.data.problems import Problems, raise_first
from modeseek_ray.data.rows import Role, Row, parse_row
from modeseek_ray.data.tokenizer import ChatTokenizer, Encoded
from modeseek_ray.errors import DataError
from modeseek_ray.types import Sample

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class LoadedRow:
    """A row and its samples: one, or in graded rows one per accepted answer."""

    row: Row
    samples: list[Sample]
    num_truncated: int


def load_samples(
    path: Path | str,
    tokenizer: ChatTokenizer,
    *,
    max_length: int | None,
    truncate: bool = False,
    role: Role = "training",
) -> list[Sample]:
    """All samples of a file, in file order. Raises DataError for the first problem, counting the others.

    `max_length` is in tokens (None = no limit); longer samples are refused, or cut with `truncate`.
    Rows that share a `group` share a number >= 0, numbered by first appearance.
    """
    problems = Problems(str(path))
    rows = read_rows(path, problems, role)
    loaded = tokenise(rows, problems, tokenizer, max_length=max_length, truncate=truncate, role=role)
    samples = [sample for row in loaded for sample in row.samples]
    raise_first([problems])
    return samples


def read_rows(path: Path | str, problems: Problems, role: Role = "training") -> Iterator[Row]:
    """The sound rows of a file; what is wrong with the others goes into `problems`."""
    return parse_records(path, problems, lambda number, record: parse_row(number, record, role))


def tokenise(
    rows: Iterator[Row],
    problems: Problems,
    tokenizer: ChatTokenizer,
    *,
    max_length: int | None,
    truncate: bool,
    role: Role,
) -> Iterator[LoadedRow]:
    """Samples of rows, many rows at a time. Raises ModelError if the tokenizer does not fit the rows."""
    groups: dict[Hashable, int] = {}
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        encoded = iter(tokenizer.encode([answer for row in chunk for answer in row.answers]))
        for row in chunk:
            label = ("pair", row.number) if row.rewards is not None else row.group
            group = -1 if label is None else groups.setdefault(label, len(groups))
            samples, num_truncated = [], 0
            try:
                rewards: Sequence[float | None] = row.rewards or [row.reward] * len(row.answers)
                results = list(itertools.islice(encoded, len(row.answers)))
                for result, reward in zip(results, rewards, strict=True):
                    if isinstance(result, DataError):
                        raise result
                    _check_vocabulary(result, tokenizer)
                    kept = _fit(result, max_length, truncate)
                    num_truncated += kept is not result
                    samples.append(_sample(row, result, kept, group, reward, role))
            except DataError as error:
                problems.add(error, row.number + 1)
            else:
                yield LoadedRow(row, samples, num_truncated)


def _fit(encoded: Encoded, max_length: int | None, truncate: bool) -> Encoded:
    """The tokens as they will be trained on. Raises DataError if they are too many or none is trained."""
    length = len(encoded.token_ids_T)
    if max_length is not None and length > max_length:
        if not truncate:
            raise DataError(
                f"has {length} tokens, but at most {max_length} are allowed.",
                mend="Shorten it, or set training.truncate.",
                code="too_long",
            )
        encoded = Encoded(encoded.token_ids_T[:max_length], encoded.trained_T[:max_length])
    if not encoded.trained_T.any():
        raise DataError(
            "no token is trained on" + (" once it is cut." if length > len(encoded.token_ids_T) else "."),
            mend="Drop the row, shorten its prompt, or lengthen its answer.",
            code="no_trained_token",
        )
    return encoded


def _check_vocabulary(encoded: Encoded, tokenizer: ChatTokenizer) -> None:
    """Tokenizers with tokens added later may know more than the model's embedding has rows for."""
    largest = int(encoded.token_ids_T.max(initial=0))
    if tokenizer.model_vocabulary is not None and largest >= tokenizer.model_vocabulary:
        raise DataError(
            f"holds {tokenizer.decode([largest])!r}, token {largest}, but the model knows"
            f" {tokenizer.model_vocabulary} tokens.",
            mend="Resize the model's embedding, or avoid the token.",
            code="unknown_token",
        )


def _sample(row: Row, whole: Encoded, kept: Encoded, group: int, reward: float | None, role: Role) -> Sample:
    log_behavior, log_behavior_T = _log_behavior(row, whole, kept)
    return Sample(
        row=row.number,
        token_ids_T=kept.token_ids_T,
        trained_T=kept.trained_T,
        prior=row.prior,
        reward=reward,
        group=group,
        log_behavior=log_behavior,
        log_behavior_T=log_behavior_T,
        is_replay=role == "replay",
        task=row.task,
        problem=row.number if row.is_graded else -1,
    )


def _log_behavior(row: Row, whole: Encoded, kept: Encoded) -> tuple[float | None, np.ndarray | None]:
    """The sampler's log-probabilities: the sum over kept trained tokens, and per token if given so."""
    if row.logprobs is None:
        return None, None
    if isinstance(row.logprobs, float):
        if kept is not whole:
            raise DataError(
                "is cut, so the sum in `logprobs` no longer fits it.",
                mend="Give one number per trained token, or shorten the row.",
                code="bad_logprobs",
            )
        return row.logprobs, None
    num_trained = int(whole.trained_T.sum())
    if len(row.logprobs) != num_trained:
        raise DataError(
            f"`logprobs` has {len(row.logprobs)} numbers for {num_trained} trained tokens.",
            mend="Give one per trained token, the end token included, or their sum.",
            code="bad_logprobs",
        )
    log_behavior_T = np.zeros(len(whole.token_ids_T), dtype=np.float32)
    log_behavior_T[whole.trained_T] = row.logprobs
    num_kept = int(kept.trained_T.sum())
    return float(sum(row.logprobs[:num_kept])), log_behavior_T[: len(kept.token_ids_T)]
