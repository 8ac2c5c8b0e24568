"""The benchmark's contenders do the same work: equal losses and scores, on a model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.train_step.__main__ import AIMS, run
from tests.bench.train_step.contenders import CONTENDERS, Outcome
from tests.bench.train_step.workload import Case, build_model
from tests.forks import environ

CASE = Case(
    vocabulary=300, layout="prompt-heavy", batch_size=2, length=16, steps=1, width=32, layers=1, threads=1
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, forks: dict[str, str]) -> dict[str, Outcome]:
    model = build_model(CASE, tmp_path_factory.mktemp("bench") / "model")
    with environ(forks):
        return {name: run(name, Path(model), CASE) for name in CONTENDERS}


def test_contenders_see_the_same_losses(outcomes: dict[str, Outcome]) -> None:
    ours = outcomes["our_sft"].losses
    assert len(ours) == 2
    assert outcomes["trl_sft"].losses == pytest.approx(ours, abs=1e-4)
    assert outcomes["our_weighted"].losses[0] == pytest.approx(ours[0], rel=1e-6)


def test_scorers_agree(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["our_scorer"].log_probs == pytest.approx(outcomes["bare_scorer"].log_probs, rel=1e-5)


def test_every_contender_was_timed_and_weighed(outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        assert len(outcome.seconds) == len(outcome.cpu_seconds) == 1
        assert outcome.seconds[0] > 0 and outcome.cpu_seconds[0] > 0
        assert outcome.peak_bytes > 50e6


def test_marks_follow_the_aims() -> None:
    def outcome(seconds: float, gigabytes: float) -> Outcome:
        return Outcome(seconds=[seconds], cpu_seconds=[1.0], peak_bytes=int(gigabytes * 1e9))

    outcomes = {
        "trl_sft": outcome(5.0, 4.0),
        "our_sft": outcome(2.0, 1.4),
        "our_weighted": outcome(2.4, 1.5),
        "bare_scorer": outcome(0.9, 1.0),
        "our_scorer": outcome(1.0, 1.0),
    }
    seen = [(round(aim.ratio(outcomes), 2), aim.reached(aim.ratio(outcomes))) for aim in AIMS]
    assert seen == [(2.5, True), (0.35, True), (1.2, False), (0.9, True)]
    assert [aim.ratio(outcomes, cpu=True) for aim in AIMS if aim.quantity != "memory"] == [1.0, 1.0, 1.0]
