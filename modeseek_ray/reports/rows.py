"""The rows a job's ledger names: most and least weighted, what that says of the data, how many starved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modeseek_ray.config import parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.reports.distribution import DOMINANT, STARVED, RowLedger
from modeseek_ray.reports.texts import RowText, row_texts
from modeseek_ray.weights.steering import Steering
from modeseek_ray.weights.weighting import uses_likelihood

ROWS_SHOWN = 10
Texts = Mapping[int, RowText] | Path


@dataclass(frozen=True)
class RowView:
    """One line of the tables of rows."""

    row: int
    uses: int
    tokens: int  # trained, over all uses
    cumulative: float
    mean: float
    first: float
    last: float
    per_token_ratio: float
    reward: float
    text: RowText | None

    @property
    def trend(self) -> str:
        """Where the weight went between the row's first and last use; a fifth is not called a change."""
        if self.uses < 2 or self.first <= 0:
            return ""
        ratio = self.last / self.first
        return "↑" if ratio > 1.2 else "↓" if ratio < 1 / 1.2 else "→"


@dataclass(frozen=True)
class LedgerView:
    """The ledger as the template shows it. `collect_more` and `sample_less` are empty where a weight
    says nothing of how well a row is mastered."""

    num_rows: int
    num_starved: int
    num_dominant: int
    starved_below: float
    dominant_above: float
    most: list[RowView]
    least: list[RowView]
    has_rewards: bool
    collect_more: list[RowView]
    sample_less: list[RowView]
    why_collect_more: str
    why_sample_less: str


def steering_of(config: Mapping[str, Any]) -> Steering | None:
    """How to read small weights of a job with this configuration; None for no likelihood factor.

    >>> steering_of({"model": "m", "training_file": "f", "method": {"type": "supervised"}})
    """
    try:
        weighting = parse_config(config).weighting
    except ConfigError:  # written by another version: the report shows what it can
        return None
    of = getattr(weighting.likelihood, "of", None)
    if of is None or not uses_likelihood(weighting):
        return None
    return "low_is_mastered" if of == "initial_over_policy" else "low_is_unmastered"


def find_texts(texts: Texts | None, rows: Sequence[int]) -> Mapping[int, RowText]:
    """The rows' texts, looked up where `texts` is a file; none of a file that is gone."""
    if isinstance(texts, Path):
        return row_texts(texts, rows) if texts.is_file() else {}
    return texts or {}


def row_views(ledger: RowLedger, indices: Sequence[int], texts: Texts | None) -> list[RowView]:
    """The rows at these indices of the ledger, with their texts."""
    found = find_texts(texts, [int(ledger.row_R[i]) for i in indices])
    return [
        RowView(
            row=int(ledger.row_R[i]),
            uses=int(ledger.uses_R[i]),
            tokens=int(ledger.tokens_R[i]),
            cumulative=float(ledger.cumulative_R[i]),
            mean=float(ledger.mean_R[i]),
            first=float(ledger.first_R[i]),
            last=float(ledger.last_R[i]),
            per_token_ratio=float(ledger.log_ratio_R[i]),
            reward=float(ledger.reward_R[i]),
            text=found.get(int(ledger.row_R[i])),
        )
        for i in indices
    ]


def ledger_view(
    ledger: RowLedger, texts: Texts | None, steering: Steering | None = None
) -> LedgerView | None:
    """What the template shows; None where nothing was weighed yet."""
    if len(ledger) == 0:
        return None
    count = (
        min(ROWS_SHOWN, -(-len(ledger) // 2)) if steering else ROWS_SHOWN
    )  # two lists, hardly a row on both
    both = [*ledger.most(count).tolist(), *ledger.least(count).tolist()]
    views = row_views(ledger, both, texts)
    most, least = views[: len(views) // 2], views[len(views) // 2 :]
    more, less = (least, most) if steering == "low_is_unmastered" else (most, least)
    more_is, less_is = ("smallest", "largest") if steering == "low_is_unmastered" else ("largest", "smallest")
    return LedgerView(
        num_rows=len(ledger),
        num_starved=len(ledger.starved_R),
        num_dominant=len(ledger.dominant_R),
        starved_below=STARVED,
        dominant_above=DOMINANT,
        most=most,
        least=least,
        has_rewards=any(view.reward == view.reward for view in views),
        collect_more=more if steering else [],
        sample_less=less if steering else [],
        why_collect_more=f"The {more_is} mean weights: what the model has not mastered. Rows are counted"
        " from 0; the arrow compares the last use with the first.",
        why_sample_less=f"The {less_is} mean weights: what it has mastered already.",
    )


def ledger_page(
    ledger: RowLedger, texts: Texts | None, steering: Steering | None, *, after: int, limit: int
) -> dict[str, Any]:
    """JSON: rows `after` to `after + limit` by row number, and the two lists, all with their texts."""
    view = ledger_view(ledger, texts, steering)
    starved, dominant = set(ledger.starved_R.tolist()), set(ledger.dominant_R.tolist())
    indices = list(range(len(ledger)))[after : after + limit]
    rows = [
        {**_row_json(row), "starved": i in starved, "dominant": i in dominant}
        for i, row in zip(indices, row_views(ledger, indices, texts), strict=True)
    ]
    return {
        "object": "list",
        "data": rows,
        "has_more": after + limit < len(ledger),
        "total": len(ledger),
        "num_starved": len(starved),
        "num_dominant": len(dominant),
        "collect_more": [] if view is None else [_row_json(row) for row in view.collect_more],
        "sample_less": [] if view is None else [_row_json(row) for row in view.sample_less],
    }


def _row_json(row: RowView) -> dict[str, Any]:
    plain = {**asdict(row), "trend": row.trend}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
