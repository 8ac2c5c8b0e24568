"""The loop of one job, written against `roles.py`: which part is asked for what, and in which order.

Reads top to bottom as the method itself: groups come from a source, are graded and scored where the
weighting needs it, weighed over the global batch, and trained on. Everything that must survive a
crash is in `DriverState`, which goes into each checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.inner import MiniBatch, merge_reports, mini_batches, parts_of
from actors.roles import Desired, Journal, Scorer, Source, Trainer, WeightChannel
from actors.rounds import FrozenRounds
from actors.saving import Checkpoints, Saver
from modeseek_ray.data.auto import ResolvedTraining, learning_rate_at
from modeseek_ray.errors import NumericsError
from modeseek_ray.objectives.deltas import ratio_warnings
from modeseek_ray.types import EvalReport, Evidence, Group, StepPlan, StepReport, Weights
from modeseek_ray.weights import Weighting, kl_coefficient, needs, observe, weigh


@dataclass(frozen=True)
class Plan:
    """What this job does, all numbers resolved."""

    weighting: Weighting
    training: ResolvedTraining
    total_steps: int  # of weighed batches
    attempt: int = 1
    inner_steps: int = 1  # optimizer steps on each batch
    looks_back: bool = False  # steps are compared with the policy the batch began with
    seed: int = 0
    median_initial_nll: float | None = None  # of the data set, where it was scored under the start


@dataclass
class DriverState:
    """All that a resumed attempt continues from. JSON-serialisable."""

    step: int = 0  # finished batches; online also the version of the weights
    trained_tokens: int = 0
    cursor: Mapping[str, Any] = field(default_factory=dict)
    controller: Mapping[str, Any] = field(default_factory=dict)  # gamma, beta, moving averages, noise


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: `run` means it reached its last step."""

    ended: Desired
    state: DriverState
    evaluations: Mapping[str, EvalReport]


class Driver:
    """One attempt at one job. `run` is called once."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        trainer: Trainer,
        journal: Journal,
        checkpoints: Checkpoints,
        *,
        probes: Mapping[str, Sequence[Group]] | None = None,
        reference: Scorer | None = None,
        channel: WeightChannel | None = None,
        frozen: FrozenRounds | None = None,
    ) -> None:
        self._plan = plan
        self._source = source
        self._trainer = trainer
        self._journal = journal
        self._checkpoints = checkpoints
        self._probes = probes or {}
        self._reference = reference
        self._channel = channel
        self._frozen = frozen
        self._needs_policy = "policy" in needs(plan.weighting)
        self._saver = Saver(
            checkpoints, trainer, journal, plan.attempt, background=plan.training.async_checkpoints
        )
        self._evaluations: Mapping[str, EvalReport] = {}
        self._sync_figures: Mapping[str, float] = {}
        self.state = DriverState()

    async def run(self) -> Outcome:
        """Train to the last step, or until the user wants something else."""
        try:
            return await self._run()
        finally:
            self._saver.drop()

    async def _run(self) -> Outcome:
        await self._prepare()
        if self.state.step == 0:
            await self._evaluate()
        await self._await_rollout()
        async for groups in self._source:
            desired = await self._journal.desired()
            if desired != "run":
                return await self._stop(desired)
            await self._train(groups)
            await self._saver.notice()
            await self._sync()
            if self._due(self._plan.training.evaluate_every):
                await self._evaluate()
            if self._due(self._plan.training.checkpoint_every):
                await self._save(last=self.state.step >= self._plan.total_steps)
            if self.state.step >= self._plan.total_steps:
                break
            await self._await_rollout()
        return Outcome("run", self.state, self._evaluations)

    async def _prepare(self) -> None:
        """Remember pi_0 while the weights still are pi_0, then load the newest checkpoint over them."""
        await self._journal.section("setup", deadline_s=1800)
        for probes in self._probes.values():
            await self._trainer.remember_start(probes)
        self.state.cursor = self._source.state()
        self.state.controller = observe({}, median_initial_nll=self._plan.median_initial_nll)
        directory = self._checkpoints.latest()
        if directory is not None:
            self.state = DriverState(**self._checkpoints.read_controller(directory))
            inexact = await self._trainer.load(directory)
            self._source.restore(self.state.cursor)
            await self._journal.message(f"Resumed from {directory.name} at step {self.state.step}.")
            if inexact is not None:
                await self._journal.message(inexact, level="warn")
            await self._sync()

    async def _await_rollout(self) -> None:
        """What comes now is up to the generator, where there is one."""
        if self._channel is not None:
            await self._journal.section("rollout", deadline_s=3600)

    async def _train(self, groups: list[Group]) -> None:
        """One pass of the method over one global batch."""
        started = time.monotonic()
        await self._journal.section("step", deadline_s=1800)
        if not groups:  # every group was tied, failed or stale
            await self._skip()
            return
        if self._reference is not None:
            groups = await self._reference.score(groups)
        if self._frozen is not None:
            groups = await self._frozen.fill(groups, self.state.step, self._trainer)
        if self._plan.looks_back:
            num_samples = sum(len(g) for g in groups)
            parts = parts_of(num_samples, self._plan.inner_steps, seed=self._inner_seed)
            groups = await self._trainer.begin(groups, parts)
        elif self._needs_policy:
            groups = await self._trainer.score(groups)
        if self._channel is not None:
            self._channel.compare_samples(groups)
        weights = self._weigh(groups)
        report = await self._step(groups, weights)
        self._source.observe(groups, weights)
        weights = replace(weights, warnings=(*weights.warnings, *ratio_warnings(report.figures)))
        if not np.isfinite([report.loss, report.grad_norm]).all():
            raise NumericsError(
                f"step {report.step}: the loss is {report.loss}, the gradient norm {report.grad_norm}.",
                mend="Lower the learning rate, or look at the batch's rows in the weights file.",
            )
        if weights.loss is not None:  # the step's own figure is then only what its gradient is taken of
            penalty = self._kl_coefficient() * (report.kl_nats or 0.0)
            report = replace(report, loss=weights.loss + penalty)
        self.state.step += 1
        self.state.trained_tokens += report.num_tokens
        # The cursor that is saved is the trained frontier, not how far the source has read ahead.
        self.state.cursor = self._source.state()
        self.state.controller = observe(weights.state, report, kl=self._plan.weighting.kl)
        seconds = {**report.seconds, "total": time.monotonic() - started}
        await self._journal.record(
            self.state.step, groups, weights, _with_seconds(report, seconds), self._plan.total_steps
        )

    async def _step(self, groups: Sequence[Group], weights: Weights) -> StepReport:
        """One optimizer step, or several on parts of the batch. The weights stay as they are meanwhile."""
        reports = [
            await self._trainer.step(part.groups, self._step_plan(part, weights))
            for part in mini_batches(groups, weights.values_N, self._plan.inner_steps, seed=self._inner_seed)
        ]
        report = merge_reports(reports)
        return replace(report, figures={**report.figures, **self._source.figures(), **self._sync_figures})

    @property
    def _inner_seed(self) -> tuple[int, int]:
        return self._plan.seed, self.state.step

    async def _skip(self) -> None:
        """A batch with nothing to learn from still counts: the source has moved on."""
        self.state.step += 1
        self.state.cursor = self._source.state()
        await self._journal.skipped(self.state.step, self._source.figures(), self._plan.total_steps)

    async def _sync(self) -> None:
        """Hand the weights to the generator: what it writes next is written by this version."""
        if self._channel is None:
            return
        await self._journal.section("sync", deadline_s=1800)
        figures = await self._channel.sync(self.state.step)
        self._sync_figures = {f"sync.{n.removeprefix('sync_')}": value for n, value in figures.items()}

    def _weigh(self, groups: Sequence[Group]) -> Weights:
        progress = self.state.step / max(self._plan.total_steps, 1)
        weights = weigh(
            Evidence.of(groups), self._plan.weighting, progress=progress, state=self.state.controller or None
        )
        if self._plan.weighting.kl is None:
            return weights
        used = {"kl_coefficient": self._kl_coefficient()}
        return replace(weights, metrics={**weights.metrics, **used})

    def _step_plan(self, part: MiniBatch, weights: Weights) -> StepPlan:
        """D is the batch's trained tokens, or its samples: never the sum of weights."""
        training = self._plan.training
        by_token = training.aggregation == "token"
        num_tokens = sum(int(g.num_tokens_N.sum()) for g in part.groups)
        return StepPlan(
            step=self.state.step,
            values_N=part.values_N,
            denominator=float(num_tokens if by_token else len(part.values_N)),
            learning_rate=learning_rate_at(self.state.step, self._plan.total_steps, training),
            kl_coefficient=self._kl_coefficient(),
            token_parameters=weights.token_parameters,
        )

    def _kl_coefficient(self) -> float:
        return kl_coefficient(self._plan.weighting.kl, self.state.controller)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step >= self._plan.total_steps

    async def _evaluate(self) -> None:
        await self._journal.section("evaluate", deadline_s=1800)
        self._evaluations = {
            name: await self._trainer.evaluate(groups, kl=True) for name, groups in self._probes.items()
        }
        figures = {"parameter_distance": await self._trainer.distance_from_start()}
        await self._journal.evaluated(self.state.step, self._evaluations, figures)

    async def _save(self, *, last: bool) -> None:
        metrics = {f"{name}.nll": report.nll for name, report in self._evaluations.items()}
        await self._saver.save(vars(self.state), metrics, last=last)

    async def _stop(self, desired: Desired) -> Outcome:
        """A pause saves first, so that nothing is lost; a cancel just ends."""
        if desired == "pause":
            await self._save(last=True)
        return Outcome(desired, self.state, self._evaluations)


def _with_seconds(report: StepReport, seconds: Mapping[str, float]) -> StepReport:
    return StepReport(**{**vars(report), "seconds": seconds})
