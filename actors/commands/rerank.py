"""`modeseek rerank`: the best answer of each prompt by the first-order solution, without training.

Some answers are graded, some need not be: a direction in the model's hidden states is fitted to the
grades, and every answer is ranked by it (METHODS.md section 3, `first_order_solver`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.reference import ReferenceModel, ScoringSpec
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.reader import read_records
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.types import FloatArray, IntArray
from modeseek_ray.weights import FirstOrderSolution, best_of_each, first_order_solver


@dataclass(frozen=True)
class Ranking:
    """Weights of all rows and the rows picked, one of each prompt."""

    row_N: IntArray
    group_N: IntArray
    num_graded: int
    solution: FirstOrderSolution
    picked_P: IntArray  # positions among the rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": len(self.row_N),
            "graded": self.num_graded,
            "prompts": len(self.picked_P),
            "infeasible_share": self.solution.negative_share,
            "picked": self.row_N[self.picked_P].tolist(),
            "weights": dict(zip(self.row_N.tolist(), self.solution.weights_N.tolist(), strict=True)),
        }


def rank(rows: Path, model: Path, *, beta: float, ridge: float) -> Ranking:
    """Read the rows, ask the model for their features, solve. Raises `DataError` without any reward."""
    limit = ModelInfo.read(model).max_length
    samples = load_samples(rows, ChatTokenizer(model), max_length=limit)
    rewards_N: FloatArray = np.array([np.nan if s.reward is None else s.reward for s in samples])
    if np.isnan(rewards_N).all():
        raise DataError(
            "no row has a reward.", file=str(rows), mend="Add `reward` to some rows.", code="no_rewards"
        )
    group_N = Dataset(samples).group_N
    features_ND = ReferenceModel(ScoringSpec(str(model))).features(samples)
    solution = first_order_solver(features_ND, rewards_N, beta=beta, group_N=group_N, ridge=ridge)
    return Ranking(
        row_N=np.array([s.row for s in samples]),
        group_N=group_N,
        num_graded=int((~np.isnan(rewards_N)).sum()),
        solution=solution,
        picked_P=best_of_each(solution.weights_N, group_N),
    )


def rerank(
    rows: Path, model: Path, out: Path | None, *, beta: float, ridge: float, as_json: bool = False
) -> int:
    """Print what was found; write the picked rows as they were, ready to train on."""
    ranking = rank(rows, model, beta=beta, ridge=ridge)
    if out is not None:
        picked = set(ranking.row_N[ranking.picked_P].tolist())
        lines = [
            json.dumps(record, ensure_ascii=False)
            for number, record in read_records(rows)
            if number in picked and not isinstance(record, DataError)
        ]
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if as_json:
        json.dump(ranking.to_dict(), sys.stdout)
        sys.stdout.write("\n")
        return 0
    share = ranking.solution.negative_share
    print(
        f"{len(ranking.picked_P):,} prompts, {len(ranking.row_N):,} answers, {ranking.num_graded:,} of them graded."
    )
    print(f"{share:.1%} of the weights are below zero: there the first order does not hold; raise --beta.")
    return 0
