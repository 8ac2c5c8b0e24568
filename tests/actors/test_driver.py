"""The loop against small fakes of its roles: what is asked, in which order, and what is remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.driver import Driver, Plan
from actors.inner import mini_batches
from actors.rounds import FrozenRounds
from modeseek_ray.data.auto import ResolvedTraining
from modeseek_ray.errors import NumericsError
from modeseek_ray.types import EvalReport, Group, Handle, StepPlan, StepReport
from modeseek_ray.weights import Weighting

MODE_SEEKING = {
    "likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.5, "length_exponent": 0.0}
}


class FourBatches:
    """Four batches of two one-sample groups; remembers how many were handed out."""

    def __init__(self) -> None:
        self.handed = 0
        self.observed: list[int] = []

    async def __aiter__(self) -> Any:
        while self.handed < 4:
            self.handed += 1
            yield [_group(2 * self.handed + j) for j in range(2)]

    def state(self) -> Mapping[str, Any]:
        return {"handed": self.handed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.handed = state["handed"]

    def observe(self, groups: Sequence[Group], weights: Any) -> None:
        self.observed.append(len(weights.values_N))

    def figures(self) -> Mapping[str, float]:
        return {"handed": float(self.handed)}


class EmptySecond(FourBatches):
    """The second batch has nothing to train on."""

    async def __aiter__(self) -> Any:
        async for groups in super().__aiter__():
            yield [] if self.handed == 2 else groups


class FakeChannel:
    """Weights to a generator that is not there."""

    def __init__(self, trainer: FakeTrainer) -> None:
        self.versions: list[int] = []
        self.compared = 0
        self._trainer = trainer

    async def sync(self, version: int) -> Mapping[str, float]:
        self._trainer.calls.append("sync")
        self.versions.append(version)
        return {"seconds": 0.5}

    def compare_samples(self, groups: Sequence[Group]) -> None:
        self.compared += len(groups)


class FakeTrainer:
    """Answers what a policy would, and writes down what it was asked."""

    def __init__(self, loss: float = 1.0) -> None:
        self.calls: list[str] = []
        self.plans: list[StepPlan] = []
        self.parts: list[list[list[int]]] = []
        self.loss = loss

    async def remember_start(self, probes: Sequence[Group]) -> None:
        self.calls.append("remember_start")

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """The start itself before the first step, then log ratios 0 and 1."""
        self.calls.append("score")
        moved = "step" in self.calls
        return [g.with_columns(log_policy_N=np.array([float(j * moved)])) for j, g in enumerate(groups)]

    async def begin(self, groups: Sequence[Group], parts: Sequence[np.ndarray] | None = None) -> list[Group]:
        self.calls.append("begin")
        self.parts.append([part.tolist() for part in parts or ()])
        return [g.with_columns(log_policy_N=np.zeros(1)) for g in groups]

    async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
        self.calls.append("step")
        self.plans.append(plan)
        return StepReport(plan.step, self.loss, 1.0, 0.5, 1.0, plan.learning_rate, num_tokens=6)

    async def evaluate(self, groups: Sequence[Group], *, kl: bool = False) -> EvalReport:
        self.calls.append(f"evaluate{'+kl' if kl else ''}")
        return EvalReport(nll=1.0, token_accuracy=0.5, num_tokens=6)

    async def distance_from_start(self) -> float:
        return float(self.calls.count("step"))

    async def save(self, directory: Path) -> None:
        self.calls.append("save")

    async def load(self, directory: Path) -> None:
        self.calls.append("load")


class FakeJournal:
    def __init__(self, stop_at: int | None = None, wanted: str = "cancel") -> None:
        self.messages: list[tuple[str, str]] = []
        self.steps: list[int] = []
        self.weights: list[np.ndarray] = []
        self.reports: list[StepReport] = []
        self.warnings: list[tuple[str, ...]] = []
        self.skips: list[tuple[int, dict[str, float]]] = []
        self.distances: dict[int, float] = {}
        self.asked = 0
        self.stop_at = stop_at
        self.wanted = wanted

    async def message(self, text: str, *, level: str = "info", **_: Any) -> None:
        self.messages.append((level, text))

    async def section(self, name: str, *, deadline_s: float) -> None: ...

    async def record(self, step: int, groups: Any, weights: Any, report: Any, total_steps: int) -> None:
        self.steps.append(step)
        self.weights.append(weights.values_N)
        self.warnings.append(weights.warnings)
        self.reports.append(report)

    async def skipped(self, step: int, figures: Mapping[str, float], total_steps: int) -> None:
        self.skips.append((step, dict(figures)))

    async def evaluated(self, step: int, reports: Any, figures: Mapping[str, float] | None = None) -> None:
        self.distances[step] = (figures or {})["parameter_distance"]

    async def checkpoint(self, step: int, directory: Path, metrics: Any) -> None: ...

    async def forget(self, checkpoints: Sequence[Path]) -> None: ...

    async def desired(self) -> str:
        self.asked += 1
        return self.wanted if self.stop_at is not None and self.asked > self.stop_at else "run"


class MemoryCheckpoints:
    def __init__(self) -> None:
        self.saved: dict[Path, dict[str, Any]] = {}

    def begin(self, step: int, attempt: int) -> Path:
        return Path(f"step-{step}.a{attempt}")

    def finish(self, directory: Path, controller: Mapping[str, Any]) -> Path:
        self.saved[directory] = dict(controller)
        return directory

    def surplus(self) -> list[Path]:
        return []

    def remove(self, surplus: Sequence[Path]) -> None: ...

    def latest(self) -> Path | None:
        return max(self.saved, key=lambda p: self.saved[p]["step"], default=None)

    def read_controller(self, directory: Path) -> dict[str, Any]:
        return dict(self.saved[directory])


def _group(row: int) -> Group:
    return Group(
        prompt=row, row_N=np.array([row]), num_tokens_N=np.array([3]), length_N=np.array([5]),
        payload=Handle([], np.array([0])), prior_N=np.ones(1), log_reference_N=np.zeros(1),
    )  # fmt: skip


def _plan(weighting: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
    training = ResolvedTraining(**{**_training(), **changes})
    return Plan(Weighting.model_validate(weighting or {}), training, total_steps=4)


def _training() -> dict[str, Any]:
    from modeseek_ray.config import Training
    from modeseek_ray.data.auto import resolve_training

    asked = Training(epochs=1, batch_size=2, learning_rate=0.1, evaluate_every=2, checkpoint_every=2)
    resolved, _ = resolve_training(asked, num_rows=8, num_parameters=10, has_lora=False)
    return vars(resolved)


def _driver(
    plan: Plan,
    *,
    trainer: FakeTrainer,
    journal: FakeJournal,
    checkpoints: Any = None,
    source: FourBatches | None = None,
    **more: Any,
) -> Driver:
    return Driver(plan, source or FourBatches(), trainer, journal, checkpoints or MemoryCheckpoints(), **more)  # type: ignore[arg-type]


async def test_plain_fine_tuning_costs_no_scoring_pass() -> None:
    trainer, journal = FakeTrainer(), FakeJournal()
    outcome = await _driver(
        _plan(), trainer=trainer, journal=journal, probes={"retention": [_group(0)]}
    ).run()
    assert trainer.calls == [
        "remember_start", "evaluate+kl", "step", "step", "evaluate+kl", "save", "step", "step", "evaluate+kl", "save",
    ]  # fmt: skip
    assert all(np.array_equal(w, np.ones(2)) for w in journal.weights)
    assert (outcome.ended, outcome.state.step, outcome.state.trained_tokens) == ("run", 4, 24)
    assert [p.denominator for p in trainer.plans] == [6.0] * 4


async def test_a_weighting_that_looks_at_the_policy_scores_before_each_step() -> None:
    trainer, journal = FakeTrainer(), FakeJournal()
    await _driver(_plan(MODE_SEEKING), trainer=trainer, journal=journal).run()
    assert trainer.calls[:4] == ["score", "step", "score", "step"]
    assert journal.weights[0].tolist() == [1.0, 1.0]
    u_N = np.exp([0.0, 0.5])  # log ratios 0 and 1 at gamma 1/2, mean one
    assert journal.weights[1] == pytest.approx(2 * u_N / u_N.sum())


async def test_a_resumed_attempt_goes_on_where_the_checkpoint_stands() -> None:
    checkpoints, first = MemoryCheckpoints(), FakeTrainer()
    stopped = FakeJournal(stop_at=3)
    outcome = await _driver(_plan(), trainer=first, journal=stopped, checkpoints=checkpoints).run()
    assert (outcome.ended, stopped.steps) == ("cancel", [1, 2, 3])
    second, journal = FakeTrainer(), FakeJournal()
    outcome = await _driver(_plan(), trainer=second, journal=journal, checkpoints=checkpoints).run()
    assert second.calls[0] == "load"
    assert (journal.steps, outcome.state.step) == ([3, 4], 4)
    assert [p.step for p in second.plans] == [2, 3]


async def test_what_is_not_exact_about_a_resume_is_a_warning() -> None:
    class Moved(FakeTrainer):
        async def load(self, directory: Path) -> str:
            return "Resumed inexactly: 2 ranks -> 1."

    checkpoints, journal = MemoryCheckpoints(), FakeJournal()
    stopped = FakeJournal(stop_at=3)
    await _driver(_plan(), trainer=FakeTrainer(), journal=stopped, checkpoints=checkpoints).run()
    await _driver(_plan(), trainer=Moved(), journal=journal, checkpoints=checkpoints).run()
    assert ("warn", "Resumed inexactly: 2 ranks -> 1.") in journal.messages
    assert stopped.messages == []


async def test_a_pause_saves_what_was_trained() -> None:
    checkpoints, trainer = MemoryCheckpoints(), FakeTrainer()
    journal = FakeJournal(stop_at=1, wanted="pause")
    outcome = await _driver(_plan(), trainer=trainer, journal=journal, checkpoints=checkpoints).run()
    assert outcome.ended == "pause"
    assert [c["step"] for c in checkpoints.saved.values()] == [1]
    assert next(iter(checkpoints.saved.values()))["cursor"] == {"handed": 1}


async def test_a_loss_that_is_not_a_number_stops_the_job() -> None:
    with pytest.raises(NumericsError, match="step 0: the loss is nan"):
        await _driver(_plan(), trainer=FakeTrainer(loss=float("nan")), journal=FakeJournal()).run()


async def test_a_kl_budget_steers_the_coefficient_and_survives_a_pause() -> None:
    """Twice the budget at rate .1: the coefficient grows by a tenth per step."""

    class Measuring(FakeTrainer):
        async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
            return dataclasses.replace(await super().step(groups, plan), kl_nats=0.2)

    plan = _plan({"kl": {"direction": "forward", "coefficient": 1.0, "budget": {"nats": 0.1}}})
    checkpoints, first, second = MemoryCheckpoints(), Measuring(), Measuring()
    pausing = FakeJournal(stop_at=2, wanted="pause")
    await _driver(plan, trainer=first, journal=pausing, checkpoints=checkpoints).run()
    await _driver(plan, trainer=second, journal=FakeJournal(), checkpoints=checkpoints).run()
    coefficients = [p.kl_coefficient for p in (*first.plans, *second.plans)]
    assert coefficients == pytest.approx([1.0, 1.1, 1.21, 1.331])


async def test_the_weights_go_to_the_generator_after_each_batch() -> None:
    trainer, journal = FakeTrainer(), FakeJournal()
    channel = FakeChannel(trainer)
    await _driver(_plan(), trainer=trainer, journal=journal, channel=channel).run()
    assert trainer.calls[:5] == ["step", "sync", "step", "sync", "save"]
    assert channel.compared > 0  # the samples, before they are weighed
    assert channel.versions == [1, 2, 3, 4]
    assert journal.reports[0].figures == {"handed": 1.0}
    assert journal.reports[1].figures == {"handed": 2.0, "sync.seconds": 0.5}


async def test_a_resumed_attempt_hands_its_weights_over_before_it_asks_for_samples() -> None:
    checkpoints, trainer = MemoryCheckpoints(), FakeTrainer()
    await _driver(
        _plan(), trainer=FakeTrainer(), journal=FakeJournal(stop_at=3), checkpoints=checkpoints
    ).run()
    channel = FakeChannel(trainer)
    await _driver(
        _plan(), trainer=trainer, journal=FakeJournal(), checkpoints=checkpoints, channel=channel
    ).run()
    assert trainer.calls[:3] == ["load", "sync", "step"] and channel.versions == [2, 3, 4]


async def test_a_batch_without_samples_counts_and_trains_nothing() -> None:
    trainer, journal = FakeTrainer(), FakeJournal()
    outcome = await _driver(_plan(), trainer=trainer, journal=journal, source=EmptySecond()).run()
    assert outcome.state.step == 4 and journal.steps == [1, 3, 4] and trainer.calls.count("step") == 3
    assert journal.skips == [(2, {"handed": 2.0})]


async def test_ratios_that_have_moved_far_are_warned_of() -> None:
    class Moving(FakeTrainer):
        async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
            figures = {"ratio/mean_abs_delta": 0.75, "ratio/far_samples": 0.5}
            return dataclasses.replace(await super().step(groups, plan), figures=figures)

    journal = FakeJournal()
    await _driver(_plan(), trainer=Moving(), journal=journal).run()
    [warning] = journal.warnings[0]
    assert warning.startswith("ratio: the mean |δ| of a token is 0.75")


async def test_inner_steps_share_one_weighing_and_look_back_to_its_policy() -> None:
    trainer, journal = FakeTrainer(), FakeJournal()
    plan = dataclasses.replace(_plan(), inner_steps=2, looks_back=True)
    await _driver(plan, trainer=trainer, journal=journal).run()
    assert trainer.calls[:4] == ["begin", "step", "step", "begin"]
    assert [sorted(parts) for parts in trainer.parts] == [[[0], [1]]] * 4, "known before the batch is weighed"
    assert [len(p.values_N) for p in trainer.plans] == [1] * 8
    assert [p.denominator for p in trainer.plans] == [3.0] * 8
    assert journal.reports[0].num_tokens == 12 and journal.steps == [1, 2, 3, 4]


def test_mini_batches_hold_every_sample_once_with_its_weight() -> None:
    groups = [
        Group(
            prompt=g, row_N=np.arange(10 * g, 10 * g + n), num_tokens_N=np.full(n, 3), length_N=np.full(n, 5),
            payload=Handle([], np.arange(n)), log_policy_N=-np.arange(10.0 * g, 10 * g + n),
        )
        for g, n in enumerate((3, 1, 4))
    ]  # fmt: skip
    rows_N = np.concatenate([g.row_N for g in groups])
    parts = mini_batches(groups, rows_N / 7.0, 3, seed=(0, 1))
    assert [len(p.values_N) for p in parts] == [3, 3, 2]
    for part in parts:
        rows = np.concatenate([g.row_N for g in part.groups])
        np.testing.assert_array_equal(part.values_N, rows / 7.0)
        np.testing.assert_array_equal(
            np.concatenate([g.log_policy_N for g in part.groups]), -rows.astype(float)
        )
        np.testing.assert_array_equal(np.concatenate([g.payload.index_N for g in part.groups]), rows % 10)
    assert sorted(np.concatenate([g.row_N for p in parts for g in p.groups])) == sorted(rows_N)
    assert mini_batches(groups, rows_N, 1, seed=(0, 1))[0].groups == groups


async def test_rounds_weigh_by_the_policy_they_began_with(tmp_path: Path) -> None:
    """Two rounds of two steps: scored anew as each begins, kept on disk, read again by a resumed attempt."""

    class Moving(FakeTrainer):
        async def score(self, groups: Sequence[Group]) -> list[Group]:
            self.calls.append("score")
            moved = float(self.calls.count("step"))
            return [g.with_columns(log_policy_N=-moved - g.row_N) for g in groups]

    trainer = Moving()
    everything = [_group(row) for row in range(10)]
    frozen = FrozenRounds(everything, tmp_path, rounds=2, total_steps=4)
    batches = []
    for step in range(4):
        batches.append(await frozen.fill([_group(2), _group(7)], step, trainer))  # type: ignore[arg-type]
        trainer.calls.append("step")
    assert trainer.calls == ["score", "step", "step", "score", "step", "step"]
    filled = [[float(g.log_round_N[0]) for g in groups] for groups in batches]  # type: ignore[index]
    assert filled == [[-2.0, -7.0], [-2.0, -7.0], [-4.0, -9.0], [-4.0, -9.0]]
    again = FrozenRounds(everything, tmp_path, rounds=2, total_steps=4)
    resumed = await again.fill([_group(7)], 3, FakeTrainer())  # type: ignore[arg-type]
    assert float(resumed[0].log_round_N[0]) == -9.0  # type: ignore[index]
