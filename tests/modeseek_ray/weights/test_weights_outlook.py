"""What a weighting would do before the first step, on numbers a person can work out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from modeseek_ray.errors import ConfigError
from modeseek_ray.types import Evidence
from modeseek_ray.weights import Weighting
from modeseek_ray.weights.outlook import BIN_EDGES, RATIOS_ARE_ONE, TOKENS_ALONE, Outlook, outlook

LN2 = float(np.log(2))


def look(weighting: dict[str, Any], log_reference: list[float], **columns: Any) -> Outlook:
    """Rows of one token each, so that L is the log-probability itself."""
    size = len(log_reference)
    evidence = Evidence(
        None, np.array(log_reference), columns.pop("num_tokens_N", np.ones(size)), row_N=100 + np.arange(size)
    )
    evidence = Evidence(**{**vars(evidence), **{k: v for k, v in columns.items() if k.endswith("_N")}})
    return outlook(
        evidence,
        Weighting.model_validate(weighting),
        name="seen",
        length_N=columns.get("length", np.full(size, 4)),
        source_N=columns.get("source", ["a"] * size),
    )


STATIC = {"likelihood": {"scheme": "ratio_power", "of": "initial", "gamma": 1.0}}


def test_a_static_ratio_shows_whom_it_starves() -> None:
    """f = p, 1/2 for nine rows and 1/64 for one: mean 0.4515625, so 1.1073 and 0.0346 of it."""
    seen = look(STATIC, [-LN2] * 9 + [-6 * LN2])
    assert (seen.num_starved, seen.num_dominant, seen.gamma) == (1, 0, 1.0)
    assert seen.starved[0].row == 109
    assert seen.starved[0].weight == pytest.approx(1 / 64 / 0.4515625)
    assert seen.ess_ratio == pytest.approx((4.5 + 1 / 64) ** 2 / (9 / 4 + 1 / 4096) / 10)
    counts = np.array(seen.counts_B)
    assert counts.sum() == 10
    assert counts[np.searchsorted(BIN_EDGES, np.log2(1.1073)) - 1] == 9


def test_sources_and_lengths_that_starve_or_dominate() -> None:
    """Twelve rows of weight 1/64 and one of 1: mean 0.0913, so 0.171 and 10.95 of it."""
    seen = look(
        {**STATIC, "guards": {"cap": None}},
        [-6 * LN2] * 12 + [0.0],
        source=["web"] * 12 + ["books"],
        length=np.array([33] * 6 + [64] * 6 + [8]),
    )
    assert [(s.label, s.num_rows, s.verdict) for s in seen.by_source] == [
        ("books", 1, "dominates"),
        ("web", 12, ""),
    ]
    assert [(s.label, s.num_rows) for s in seen.by_length] == [("5–8", 1), ("33–64", 12)]
    assert seen.by_source[0].weight_share == pytest.approx(1 / (1 + 12 / 64))
    assert [row.row for row in seen.dominant] == [112]
    assert seen.corr_length is None  # every row has one trained token
    assert seen.corr_initial_nll == pytest.approx(-1.0)


@pytest.mark.parametrize("preset", ["mode_seeking", "anchored", "iw_sft"])
def test_ratios_to_the_start_are_all_one_and_it_says_so(preset: str) -> None:
    seen = look({"preset": preset}, [-1.0, -50.0, -3.0])
    assert seen.ess_ratio == 1.0
    assert (seen.num_starved, seen.num_dominant) == (0, 0)
    assert RATIOS_ARE_ONE in seen.notes


def test_token_factors_leave_samples_alone_and_it_says_so() -> None:
    seen = look({"preset": "dft"}, [-1.0, -50.0])
    assert (seen.ess_ratio, seen.notes) == (1.0, (TOKENS_ALONE,))


def test_rewards_speak_before_training() -> None:
    """exp(r) of 0 and ln 3: 1 and 3, so 1/2 and 3/2 of the mean; ESS 16/20."""
    setting = {"reward": {"scheme": "exponential", "beta": 1.0}}
    seen = look(setting, [-1.0, -1.0], rewards_N=np.array([0.0, np.log(3)]), source=["low", "high"])
    assert {s.label: s.mean for s in seen.by_source} == pytest.approx({"high": 1.5, "low": 0.5})
    assert (seen.ess_ratio, seen.beta) == (pytest.approx(0.8), 1.0)


def test_a_weighting_that_the_rows_cannot_feed_is_refused() -> None:
    with pytest.raises(ConfigError, match="rewards_N"):
        look({"preset": "rwr"}, [-1.0, -2.0])


def test_all_presets_that_need_no_rewards_or_sampler_can_be_looked_at() -> None:
    for preset in (
        "sft",
        "mode_seeking",
        "anchored",
        "flow",
        "iw_sft",
        "dft",
        "asft",
        "psft",
        "eaft",
        "talr",
    ):
        seen = look({"preset": preset}, [-1.0, -4.0, -9.0], num_tokens_N=np.array([1, 2, 3]))
        assert json.loads(json.dumps(seen.to_dict(), allow_nan=False))["num_rows"] == 3
        assert sum(seen.counts_B) == 3
