"""Ranks' sums and columns, put together: one division, by a global count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from actors.messages import RankEvaluation, RankReport
from modeseek_ray.objectives.deltas import DeltaSums
from modeseek_ray.types import EvalReport, FloatArray, Group, StepPlan, StepReport


def with_sum_delta(group: Group) -> Group:
    """NaN is a sample whose sampler's log-probabilities nobody knows: 0 for replay rows, which are outside of
    ratios, and no column for a group of others."""
    assert group.sum_delta_N is not None
    unknown_N = np.isnan(group.sum_delta_N)
    is_replay_N = np.zeros(len(group), dtype=np.bool_) if group.is_replay_N is None else group.is_replay_N
    if (unknown_N & ~is_replay_N).any():
        return replace(group, sum_delta_N=None)
    return replace(group, sum_delta_N=np.where(unknown_N, 0.0, group.sum_delta_N))


def sum_reports(plan: StepPlan, reports: Sequence[RankReport], begun: Mapping[str, float]) -> StepReport:
    """Global figures from the ranks' sums; the slowest rank's seconds. `begun`: figures of the whole batch."""
    num_tokens = sum(r.num_tokens for r in reports)
    kl_sums = [r.kl_sum for r in reports if r.kl_sum is not None]
    entropies = [r.entropy_sum for r in reports if r.entropy_sum is not None]
    parts = sorted({name for r in reports for name in r.seconds})
    return StepReport(
        step=plan.step,
        loss=sum(r.loss for r in reports),
        nll=sum(r.nll_sum for r in reports) / max(num_tokens, 1),
        accuracy=sum(r.num_correct for r in reports) / max(num_tokens, 1),
        grad_norm=reports[0].grad_norm,
        learning_rate=plan.learning_rate,
        num_tokens=num_tokens,
        num_padded=sum(r.num_padded for r in reports),
        num_positions=sum(r.num_positions for r in reports),
        grad_norm_clipped=reports[0].grad_norm_clipped,
        kl_nats=sum(kl_sums) / max(num_tokens, 1) if kl_sums else None,
        entropy=sum(entropies) / max(num_tokens, 1) if entropies else None,
        seconds={name: max(r.seconds.get(name, 0.0) for r in reports) for name in parts},
        figures={
            **begun,
            **sum((r.ratio for r in reports), DeltaSums()).figures("ratio"),
            **RankReport.routing(reports),
        },
    )


def summarise(rows: RankEvaluation, *, by_task: bool = True) -> EvalReport:
    """Means over tokens and problems, and the same for each task.

    A problem with several accepted answers has one row each. Its loss is that of the first, and it
    counts as right when greedy decoding writes any of them. Rows of problem -1 (text to be
    predicted, not a question) have a loss but no right or wrong.
    """
    # An ungraded row counts for itself; its negated position is an id nobody else has.
    problem_N = np.where(rows.problem_N >= 0, rows.problem_N, -1 - np.arange(len(rows.problem_N)))
    ids_P, first_P, problem_index_N = np.unique(problem_N, return_index=True, return_inverse=True)
    right_P = np.zeros(len(first_P), dtype=bool)
    np.logical_or.at(right_P, problem_index_N, rows.all_correct_N)
    graded_P = ids_P >= 0
    num_tokens = int(rows.num_tokens_N[first_P].sum())

    def per_token(sum_N: FloatArray | None) -> float | None:
        return None if sum_N is None else float(sum_N[first_P].sum()) / max(num_tokens, 1)

    names = sorted({t for t in rows.tasks if t}) if by_task else []
    return EvalReport(
        nll=float(rows.nll_N[first_P].sum()) / max(num_tokens, 1),
        token_accuracy=int(rows.num_correct_N[first_P].sum()) / max(num_tokens, 1),
        num_tokens=num_tokens,
        accuracy=float(right_P[graded_P].mean()) if graded_P.any() else None,
        entropy=per_token(rows.entropy_N),
        kl_nats=per_token(rows.kl_N),
        kl_reverse_nats=per_token(rows.kl_reverse_N),
        by_task={name: summarise(_rows_of(rows, name), by_task=False) for name in names},
    )


def _rows_of(rows: RankEvaluation, task: str) -> RankEvaluation:
    keep_N = np.array([t == task for t in rows.tasks])

    def kept(column_N: FloatArray | None) -> FloatArray | None:
        return None if column_N is None else column_N[keep_N]

    return RankEvaluation(
        nll_N=rows.nll_N[keep_N],
        num_correct_N=rows.num_correct_N[keep_N],
        num_tokens_N=rows.num_tokens_N[keep_N],
        all_correct_N=rows.all_correct_N[keep_N],
        problem_N=rows.problem_N[keep_N],
        tasks=tuple(t for t in rows.tasks if t == task),
        entropy_N=kept(rows.entropy_N),
        kl_N=kept(rows.kl_N),
        kl_reverse_N=kept(rows.kl_reverse_N),
    )
