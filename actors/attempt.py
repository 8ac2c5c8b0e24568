"""One attempt at one job: from files and a configuration to an exported, checked model.

The same steps on a Ray cluster and in this process; what differs is the `Placement`. Order matters:
the data set is scored before the trainers are placed (both may need every CPU), and the export is
checked after they are gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.attempt_spec import FROM_DISK, AttemptResult, AttemptSpec
from actors.checkpoint import CheckpointStore
from actors.driver import Driver, Outcome, Plan
from actors.export import Exported, largest_difference
from actors.journal import ResultJournal
from actors.objective import objective_of
from actors.origin import origin_of
from actors.placement import Placement
from actors.pools import TrainerPool
from actors.roles import Source
from actors.rounds import FrozenRounds
from actors.row_files import RowFileStore
from actors.score_cache import Scores
from actors.scoring import ScoringSpec, score_dataset, scores_of
from actors.sources import DatasetSource, probe_groups
from actors.trainer import TrainerSpec
from modeseek_ray.data.auto import ResolvedTraining, resolve_training
from modeseek_ray.data.cursor import Cursor
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.rows import Role
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import ConfigError, ModeseekError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import checkpoint_bytes
from modeseek_ray.reports.results import JobRecord, write_job
from modeseek_ray.types import Sample
from modeseek_ray.weights import needs

SCORING_DEADLINE_S = 6 * 3600.0
EXPORT_CHECK_SAMPLES = 16


@dataclass(frozen=True)
class JobData:
    """The job's files as samples."""

    dataset: Dataset
    probes: Mapping[str, list[Sample]]


class Attempt:
    """Runs an `AttemptSpec` once."""

    def __init__(self, spec: AttemptSpec, placement: Placement, journal: ResultJournal) -> None:
        self._spec = spec
        self._config = spec.config
        self._placement = placement
        self._journal = journal
        self._model = ModelInfo.read(spec.model_path)
        self._objective = objective_of(spec.config)
        self._job_record = JobRecord(
            id=spec.job_id,
            name=spec.config.suffix or spec.job_id,
            config=spec.config.model_dump(mode="json", exclude_unset=True),
            model=spec.config.model,
            attempt=spec.attempt,
            started_at=time.time(),
        )

    async def run(self) -> AttemptResult:
        """Run to an end of any kind; `results/job.json` says which."""
        try:
            return await self._run()
        except ModeseekError as error:
            self._record("failed", finished_at=time.time(), error=error.to_dict())
            raise

    async def _run(self) -> AttemptResult:
        data = self._load()
        training = await self._resolve(data.dataset)
        dataset = await self._score(data.dataset)
        cursor = self._cursor(dataset, training)
        plan = replace(self._plan(training, cursor.num_steps), median_initial_nll=dataset.median_initial_nll)
        trainer = await self._placement.trainers(self._trainer_spec(), self._config.resources.trainers)
        try:
            source = DatasetSource(dataset, cursor, self._placement.put)
            driver = await self._driver(
                plan, source, trainer, data.probes, frozen=self._frozen_rounds(dataset, plan)
            )
            outcome = await driver.run()
            if outcome.ended != "run":
                return self._stopped(outcome)
            exported = await self._export(trainer, dataset.samples[:EXPORT_CHECK_SAMPLES])
        finally:
            await trainer.close()
            await self._placement.close()
        return await self._succeed(outcome, exported, training)

    def _frozen_rounds(self, dataset: Dataset, plan: Plan) -> FrozenRounds | None:
        """Where the weighting looks at the policy its round began with."""
        if "round" not in needs(plan.weighting):
            return None
        everything = dataset.groups(dataset.all_indices(), self._placement.put(dataset.samples))
        return FrozenRounds(
            everything,
            self._spec.directory / "rounds",
            rounds=plan.weighting.rounds,
            total_steps=plan.total_steps,
        )

    def _plan(self, training: ResolvedTraining, total_steps: int) -> Plan:
        self._record("running", picked=asdict(training), total_steps=total_steps)
        return Plan(
            weighting=self._config.weighting,
            training=training,
            total_steps=total_steps,
            attempt=self._spec.attempt,
            inner_steps=self._config.training.inner_steps,
            looks_back=self._objective.looks_back,
            seed=self._config.seed,
        )

    async def _driver(
        self,
        plan: Plan,
        source: Source,
        trainer: TrainerPool,
        probes: Mapping[str, Sequence[Sample]],
        **more: Any,
    ) -> Driver:
        """The loop, with its trainers set up and its history cut at the checkpoint it goes on from."""
        await self._journal.section("setup", deadline_s=1800)
        await self._journal.message("Trainers are ready.", **await trainer.setup())
        checkpoints = RowFileStore(
            self._spec.directory / "checkpoints",
            plan.training.keep_checkpoints,
            expected_bytes=checkpoint_bytes(self._config, self._model),
            origin=origin_of(self._config),
        )
        if self._spec.committed is not FROM_DISK:
            checkpoints.forget_uncommitted(self._spec.committed)
        latest = checkpoints.latest()
        await self._say_what_is_damaged(checkpoints, latest)
        self._journal.resume_from(0 if latest is None else checkpoints.read_controller(latest)["step"])
        for difference in [] if latest is None else checkpoints.differences(latest):
            await self._journal.message(difference, level="warn")
        probed = {name: probe_groups(rows, self._placement.put) for name, rows in probes.items()}
        return Driver(plan, source, trainer, self._journal, checkpoints, probes=probed, **more)

    async def _say_what_is_damaged(self, checkpoints: CheckpointStore, latest: Path | None) -> None:
        """Steps that were committed are trained again: the user should hear why."""
        newest = self._spec.committed if self._spec.committed is not FROM_DISK else None
        newest = newest or next(iter(checkpoints.all()), None)
        if newest is None or newest == latest:
            return
        on = "from the beginning" if latest is None else f"from {latest.name}"
        await self._journal.message(
            f"The checkpoint {newest.name} is damaged or gone: the job goes on {on}.", level="warn"
        )

    def _stopped(self, outcome: Outcome) -> AttemptResult:
        self._record("paused" if outcome.ended == "pause" else "cancelled", finished_at=time.time())
        return AttemptResult(outcome)

    async def _succeed(
        self, outcome: Outcome, exported: Exported, training: ResolvedTraining, *more_files: Path
    ) -> AttemptResult:
        """Check the export once the trainers are gone, and finish the result files."""
        await self._check_export(exported)
        self._record("succeeded", finished_at=time.time(), weights_sha256=exported.sha256)
        files = [*self._journal.close(), *more_files, self._report()]
        return AttemptResult(outcome, self._export_path, files, asdict(training), exported.sha256)

    @property
    def _export_path(self) -> Path:
        return self._spec.directory / "model"

    def _load(self) -> JobData:
        """Tokenise all files. They were checked before; what is wrong now has changed since."""
        tokenizer = ChatTokenizer(self._spec.model_path)
        replay = self._samples("replay", tokenizer) if self._has("replay") else ()
        return JobData(Dataset(self._samples("training", tokenizer), replay), self._probes(tokenizer))

    def _probes(self, tokenizer: ChatTokenizer) -> dict[str, list[Sample]]:
        held_out: tuple[Role, ...] = ("validation", "retention")
        return {role: self._samples(role, tokenizer) for role in held_out if self._has(role)}

    def _samples(self, role: Role, tokenizer: ChatTokenizer) -> list[Sample]:
        path = self._spec.files[f"{role}_file"]
        truncate = self._config.training.truncate
        return load_samples(path, tokenizer, max_length=self._max_length, truncate=truncate, role=role)

    def _has(self, role: Role) -> bool:
        return f"{role}_file" in self._spec.files

    @property
    def _max_length(self) -> int:
        """Most tokens of a sample."""
        return min(self._config.training.max_length or self._model.max_length, self._model.max_length)

    async def _resolve(self, dataset: Dataset) -> ResolvedTraining:
        training, messages = resolve_training(
            self._config.training,
            num_rows=dataset.num_new,
            num_parameters=self._model.num_parameters,
            has_lora=self._config.training.lora is not None,
            largest_group=int(np.bincount(dataset.group_N).max()),
        )
        for text in messages:
            await self._journal.message(text)
        return training

    async def _score(self, dataset: Dataset) -> Dataset:
        """Fill in log pi_0 and log mu-hat where the weighting looks at them, once per data set."""
        wanted = needs(self._config.weighting)
        if "initial" in wanted:
            scores = await self._scores(dataset, self._spec.model_path, "the starting model")
            dataset = dataset.with_columns(log_reference_N=scores.log_prob_N)
            if scores.routes_N is not None:
                dataset = dataset.with_start_routes(scores.routes_N)
        if "behavior" in wanted and dataset.log_behavior_N is None:
            if self._spec.behavior_model_path is None:
                raise ConfigError(
                    "this weighting needs the data's own log-probabilities.",
                    param="behavior_model",
                    mend="Give each row `logprobs`, or name the SFT checkpoint that stands for the data.",
                )
            dataset = dataset.with_columns(
                log_behavior_N=(
                    await self._scores(
                        dataset, self._spec.behavior_model_path, "the model of the data", with_routes=False
                    )
                ).log_prob_N
            )
        return dataset

    async def _scores(self, dataset: Dataset, model: Path, name: str, *, with_routes: bool = True) -> Scores:
        await self._journal.section("score", deadline_s=SCORING_DEADLINE_S)
        await self._journal.message(f"Scoring {len(dataset.samples)} samples under {name}.")
        return await scores_of(
            dataset.samples,
            self._scoring_spec(model, with_routes=with_routes),
            cache_dir=self._spec.cache / "scores",
            num_scorers=self._config.resources.scorers,
            on_ray=self._placement.on_ray,
            deadline_s=SCORING_DEADLINE_S,
            progress=self._journal.progress("Scored {done:,} of {total:,} samples."),
        )

    def _scoring_spec(self, model: Path, *, with_routes: bool = False) -> ScoringSpec:
        resources = self._config.resources
        return ScoringSpec(
            model_path=str(model),
            dtype=resources.dtype,
            temperature=self._objective.temperature,
            micro_batch_tokens=resources.micro_batch_tokens,
            cpus_per_worker=resources.cpus_per_worker,
            gpus_per_worker=resources.gpus_per_worker,
            with_routes=with_routes and self._objective.routing_replay == "R0",
        )

    def _trainer_spec(self) -> TrainerSpec:
        return TrainerSpec(
            model_path=str(self._spec.model_path),
            objective=self._objective,
            compare_routes=self._config.online is not None and self._config.online.compare_routes,
            training=self._config.training,
            resources=self._config.resources,
            seed=self._config.seed,
        )

    def _cursor(self, dataset: Dataset, training: ResolvedTraining) -> Cursor:
        return Cursor(
            dataset.group_N,
            training.batch_size,
            seed=self._config.seed,
            epochs=training.epochs,
            max_steps=training.max_steps,
            is_replay_N=dataset.is_replay_N,
            replay_share=training.replay_share,
        )

    async def _export(self, trainer: TrainerPool, samples: Sequence[Sample]) -> Exported:
        """Write the model, and what its log-probabilities must be when somebody loads it."""
        await self._journal.section("export", deadline_s=3600)
        await trainer.export(self._export_path)
        expected_N = np.empty(len(samples))
        for group in await trainer.score_live(probe_groups(samples, self._placement.put)):
            # A group gathers the rows of a prompt; the check reads them in their own order.
            expected_N[group.payload.index_N] = group.log_policy_N
        return Exported(samples, expected_N, await trainer.weights_sha256())

    async def _check_export(self, exported: Exported) -> None:
        """Load the export as a user would and compare. A model that differs is not a success."""
        found_N = await score_dataset(
            exported.samples,
            self._scoring_spec(self._export_path),
            cache_dir=None,
            num_scorers=1,
            on_ray=self._placement.on_ray,
            deadline_s=1800,
        )
        off = largest_difference(exported, found_N, self._config.resources.dtype)
        await self._journal.message(
            f"Export checked: loaded again, its log-probabilities are the trainer's to {off:.1e} nats per token.",
            export_error_nats=off,
        )

    def _report(self) -> Path:
        from modeseek_ray.reports import write_report  # matplotlib: not before it is needed

        results = self._spec.directory / "results"
        return write_report(results, results / "report.html", self._spec.files["training_file"])

    def _record(self, status: str, **figures: Any) -> None:
        """`results/job.json`: what the report shows beside the curves."""
        self._job_record = replace(self._job_record, status=status, **figures)
        write_job(self._spec.directory / "results", self._job_record)
