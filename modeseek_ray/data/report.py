"""What is in a job's files, in figures, and what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modeseek_ray.data.problems import Problems, raise_first
from modeseek_ray.data.prompts import PromptRow
from modeseek_ray.data.rows import Role, Row
from modeseek_ray.errors import Warn
from modeseek_ray.types import Sample


@dataclass
class FileReport:
    """One file. Figures count sound rows only; those of tokens are 0 if no tokenizer was at hand."""

    file: str
    role: Role
    problems: Problems
    max_length: int | None = None
    rows: int = 0
    rows_with_reward: int = 0
    rows_with_logprobs: int = 0
    rows_with_token_logprobs: int = 0
    """Of these, as a list: one number per trained token."""
    graded_rows: int = 0
    pairs: int = 0
    """Preference rows: two samples each, one group."""
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    """Samples cut to `max_length`."""
    padding_share: float = 0.0
    """Estimated share of computed positions that are padding."""
    smallest_reward: float = math.inf
    largest_reward: float = -math.inf
    prior_sum: float = 0.0
    tasks: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample."""
    item_fields: set[str] = field(default_factory=set)
    """Of prompt rows: what graders can read, in any row."""
    _labelled: Counter[str | int] = field(default_factory=Counter)
    _rewarded: Counter[str | int] = field(default_factory=Counter)
    """Samples with a reward in each labelled group."""
    _rewarded_alone: int | None = None
    """Of the rows without a group: the fewest a rewarded one has, 2 for a pair."""

    def add_prompt(self, row: PromptRow, num_tokens: int = 0) -> None:
        """A question that the generator answers; `num_tokens` 0 = not counted."""
        self.rows += 1
        self.prior_sum += row.prior
        self.item_fields |= row.item.keys()
        if row.task:
            self.tasks[row.task] += 1
        if num_tokens:
            self.tokens += num_tokens
            self.lengths.append(num_tokens)

    def add_row(self, row: Row) -> None:
        self.rows += 1
        self.graded_rows += row.is_graded
        self.rows_with_logprobs += row.logprobs is not None
        self.rows_with_token_logprobs += row.logprobs is not None and not isinstance(row.logprobs, float)
        self.prior_sum += row.prior
        rewards = row.rewards or ([] if row.reward is None else [row.reward])
        self.pairs += row.rewards is not None
        if rewards:
            self.rows_with_reward += 1
            self.smallest_reward = min(*rewards, self.smallest_reward)
            self.largest_reward = max(*rewards, self.largest_reward)
            self._count_rewarded(row)
        if row.task:
            self.tasks[row.task] += 1
        if row.group is not None:
            self._labelled[row.group] += 1

    def _count_rewarded(self, row: Row) -> None:
        if row.group is not None:
            self._rewarded[row.group] += len(row.answers)
            return
        own = 1 if row.rewards is None else len(row.rewards)
        self._rewarded_alone = min(own, self._rewarded_alone or own)

    def add_samples(self, samples: Sequence[Sample], num_truncated: int) -> None:
        self.samples += len(samples)
        self.truncated += num_truncated
        for sample in samples:
            self.tokens += sample.length
            self.trained_tokens += sample.num_tokens
            self.lengths.append(sample.length)

    @property
    def groups(self) -> int:
        """Prompts: groups, and rows without one."""
        return self.rows - self._labelled.total() + len(self._labelled)

    @property
    def largest_group(self) -> int:
        return max(2 if self.pairs else min(1, self.rows), *self._labelled.values(), 0)

    @property
    def smallest_rewarded_group(self) -> int | None:
        """Rewarded samples of the prompt that has fewest, those without any left out; None where no row has one."""
        alone = [] if self._rewarded_alone is None else [self._rewarded_alone]
        return min([*alone, *self._rewarded.values()], default=None)

    @property
    def group_sizes(self) -> dict[int, int]:
        """{size: how many groups have it}."""
        sizes = Counter(self._labelled.values())
        sizes[1] += self.rows - self.pairs - self._labelled.total()
        sizes[2] += self.pairs
        return {size: count for size, count in sorted(sizes.items()) if count}

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def has_rewards(self) -> bool:
        """At least one row has a reward."""
        return self.rows_with_reward > 0

    @property
    def has_logprobs(self) -> bool:
        """Every row has the sampler's log-probabilities."""
        return self.rows > 0 and self.rows_with_logprobs == self.rows

    @property
    def has_token_logprobs(self) -> bool:
        """Every row has them token by token."""
        return self.rows > 0 and self.rows_with_token_logprobs == self.rows

    @property
    def length_histogram(self) -> dict[int, int]:
        """{upper bound in tokens, a power of two: samples of at most that and more than half of it}."""
        if not self.lengths:
            return {}
        bounds = Counter(1 << (length - 1).bit_length() for length in self.lengths)
        return dict(sorted(bounds.items()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "role": self.role,
            "rows": self.rows,
            "groups": self.groups,
            "group_sizes": {str(size): count for size, count in self.group_sizes.items()},
            "has_rewards": self.has_rewards,
            "rows_with_reward": self.rows_with_reward,
            "has_logprobs": self.has_logprobs,
            "rows_with_logprobs": self.rows_with_logprobs,
            "graded_rows": self.graded_rows,
            "pairs": self.pairs,
            "tasks": dict(sorted(self.tasks.items())),
            "samples": self.samples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "longest": self.longest,
            "max_length": self.max_length,
            "truncated": self.truncated,
            "padding_share": self.padding_share,
            "length_histogram": {str(bound): count for bound, count in self.length_histogram.items()},
            "problem_counts": dict(self.problems.counts),
            "problems": [problem.to_dict() for problem in self.problems.examples],
        }


@dataclass(frozen=True)
class DataReport:
    """All files of a job, by role."""

    files: Mapping[Role, FileReport]
    warnings: tuple[Warn, ...] = ()

    @property
    def ok(self) -> bool:
        return not any(report.problems for report in self.files.values())

    @property
    def training(self) -> FileReport:
        return self.files["training"]

    def raise_if_bad(self) -> None:
        """Raise DataError for the first problem, with file and line and a count of all others."""
        raise_first(report.problems for report in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "files": {role: report.to_dict() for role, report in self.files.items()},
            "warnings": [{"code": w.code, "message": w.message, "param": w.param} for w in self.warnings],
        }
