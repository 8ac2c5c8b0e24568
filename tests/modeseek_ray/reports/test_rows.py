"""What a ledger says of the data: which rows to collect more of, which to sample less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from modeseek_ray.reports.distribution import RowLedger, distribution
from modeseek_ray.reports.ledger import SCHEMA
from modeseek_ray.reports.rows import ledger_page, ledger_view, steering_of
from modeseek_ray.reports.texts import RowText

# step, row, weight, trained tokens: row 3 is hardly learnt from, row 1 is mastered.
USES = [(1, 0, 1.0, 4), (1, 1, 1.9, 7), (2, 3, 0.04, 2), (2, 1, 2.5, 7), (3, 3, 0.05, 2), (3, 2, 0.9, 5)]
TEXTS = {row: RowText(f"question {row}", f"answer {row}") for row in range(4)}


@pytest.fixture
def ledger() -> RowLedger:
    names = ("step", "row", "weight", "num_tokens")
    rows = [{**dict(zip(names, use, strict=True)), "is_replay": False} for use in USES]
    return distribution([pa.Table.from_pylist(rows, schema=SCHEMA)])[1]


def config(**weighted: Any) -> dict[str, Any]:
    return {"model": "m", "training_file": "f", "method": {"type": "weighted", "weighted": weighted}}


def test_trained_tokens_add_up_over_uses(ledger: RowLedger) -> None:
    assert ledger.tokens_R.tolist() == [4, 14, 5, 4]


def test_light_rows_are_not_mastered_under_a_ratio_to_the_start(ledger: RowLedger) -> None:
    view = ledger_view(ledger, TEXTS, "low_is_unmastered")
    assert view is not None
    assert [row.row for row in view.collect_more] == [3, 2]
    assert [row.row for row in view.sample_less] == [1, 0]
    assert view.collect_more[0].text == TEXTS[3]
    assert "smallest" in view.why_collect_more and "largest" in view.why_sample_less


def test_the_ratio_turned_round_turns_the_lists_round(ledger: RowLedger) -> None:
    view = ledger_view(ledger, TEXTS, "low_is_mastered")
    assert view is not None
    assert [row.row for row in view.collect_more] == [1, 0]
    assert [row.row for row in view.sample_less] == [3, 2]


@pytest.mark.parametrize(
    ("weighted", "expected"),
    [
        ({"preset": "mode_seeking"}, "low_is_unmastered"),
        ({"preset": "flow"}, "low_is_unmastered"),
        ({"preset": "anchored"}, "low_is_mastered"),
        ({"preset": "sft"}, None),
        ({"preset": "rwr"}, None),
        ({"likelihood": {"scheme": "ratio_power", "gamma": 0.0}}, None),
    ],
)
def test_only_a_likelihood_factor_steers(weighted: dict[str, Any], expected: str | None) -> None:
    assert steering_of(config(**weighted)) == expected


def test_a_configuration_of_another_version_steers_nothing() -> None:
    assert steering_of({"model": "m", "recipe": "old"}) is None


def test_the_ledger_as_json_in_pages(ledger: RowLedger, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "q{i}", "completion": "a{i}"}}\n' for i in range(4)))
    page = ledger_page(ledger, file, "low_is_unmastered", after=2, limit=2)
    assert json.loads(json.dumps(page, allow_nan=False)) == page
    assert [(row["row"], row["uses"], row["tokens"]) for row in page["data"]] == [(2, 1, 5), (3, 2, 4)]
    assert page["data"][1]["cumulative"] == pytest.approx(0.09)
    assert (page["data"][1]["starved"], page["data"][1]["trend"]) == (True, "↑")
    assert page["data"][1]["text"] == {"prompt": "q3", "completion": "a3"}
    assert page["data"][0]["reward"] is None
    assert (page["total"], page["has_more"], page["num_starved"]) == (4, False, 1)
    assert [row["row"] for row in page["collect_more"]] == [3, 2]
    file.unlink()
    assert ledger_page(ledger, file, None, after=0, limit=1)["data"][0]["text"] is None
