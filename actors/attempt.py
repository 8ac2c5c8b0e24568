"""One attempt at one job: from files and a configuration to an exported, checked model.

The same steps on a Ray cluster and in this process; what differs is the `Placement`. Order matters:
the data set is scored before the trainers are placed (both may need every CPU), and the export is
checked after they are gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.checkpoint import CheckpointStore
from actors.driver import Driver, Outcome, Plan
from actors.journal import ResultJournal
from actors.pools import TrainerPool
from actors.scoring import ScoringSpec, score_dataset
from actors.sources import DatasetSource, probe_groups
from actors.trainer import TrainerSpec
from modeseek_ray.config import JobConfig
from modeseek_ray.data.auto import ResolvedTraining, resolve_training
from modeseek_ray.data.cursor import Cursor
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.data.loading import load_samples
from modeseek_ray.data.rows import Role
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import ConfigError, ModeseekError, NumericsError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.objectives.parameters import factor_parameters
from modeseek_ray.reports.results import JobRecord, write_job
from modeseek_ray.types import FloatArray, Group, Objective, Sample
from modeseek_ray.weights import needs

SCORING_DEADLINE_S = 6 * 3600.0
EXPORT_CHECK_SAMPLES = 16
FROM_DISK = Path("newest")
# Most that a reloaded export's log-probabilities may be off, in nats per token.
EXPORT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Placement(Protocol):
    """Where workers run: this process (`local.py`) or a Ray cluster (`cluster.py`)."""

    on_ray: bool

    def put(self, block: Any) -> Any: ...

    async def trainers(self, spec: TrainerSpec, count: int) -> TrainerPool: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class AttemptSpec:
    """What an attempt starts from."""

    job_id: str
    attempt: int
    config: JobConfig
    files: Mapping[str, Path]  # by role: training_file, validation_file, retention_file, replay_file
    model_path: Path
    directory: Path  # the job's: checkpoints/, results/, model/
    cache: Path  # shared by jobs: reference scores
    behavior_model_path: Path | None = None
    # The newest checkpoint that a store has committed (None = none yet). FROM_DISK: no store keeps
    # this job's history, so a checkpoint that is complete on disk is committed.
    committed: Path | None = FROM_DISK


@dataclass(frozen=True)
class AttemptResult:
    """How it ended, and what there is to show."""

    outcome: Outcome
    model_path: Path | None = None
    result_files: Sequence[Path] = ()
    picked: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None


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
        plan = Plan(
            weighting=self._config.weighting,
            training=training,
            total_steps=cursor.num_steps,
            attempt=self._spec.attempt,
        )
        self._record("running", picked=asdict(training), total_steps=plan.total_steps)
        trainer = await self._placement.trainers(self._trainer_spec(), self._config.resources.trainers)
        try:
            facts = await trainer.setup()
            await self._journal.message("Trainers are ready.", **facts)
            probes = {name: probe_groups(rows, self._placement.put) for name, rows in data.probes.items()}
            checkpoints = CheckpointStore(self._spec.directory / "checkpoints", training.keep_checkpoints)
            if self._spec.committed is not FROM_DISK:
                checkpoints.forget_uncommitted(self._spec.committed)
            latest = checkpoints.latest()
            self._journal.resume_from(0 if latest is None else checkpoints.read_controller(latest)["step"])
            source = DatasetSource(dataset, cursor, self._placement.put)
            outcome = await Driver(plan, source, trainer, self._journal, checkpoints, probes=probes).run()
            if outcome.ended != "run":
                self._record("paused" if outcome.ended == "pause" else "cancelled", finished_at=time.time())
                return AttemptResult(outcome)
            expected, sha256 = await self._export(trainer, dataset)
        finally:
            await trainer.close()
            await self._placement.close()
        await self._check_export(dataset, expected)
        self._record("succeeded", finished_at=time.time(), weights_sha256=sha256)
        files = [*self._journal.close(), self._report()]
        return AttemptResult(outcome, self._export_path, files, asdict(training), sha256)

    @property
    def _export_path(self) -> Path:
        return self._spec.directory / "model"

    def _load(self) -> JobData:
        """Tokenise all files. They were checked before; what is wrong now has changed since."""
        tokenizer = ChatTokenizer(self._spec.model_path)
        training = self._config.training
        limit = min(training.max_length or self._model.max_length, self._model.max_length)

        def load(role: Role) -> list[Sample]:
            path = self._spec.files[f"{role}_file"]
            return load_samples(path, tokenizer, max_length=limit, truncate=training.truncate, role=role)

        def has(role: str) -> bool:
            return f"{role}_file" in self._spec.files

        held_out: tuple[Role, ...] = ("validation", "retention")
        probes: dict[str, list[Sample]] = {role: load(role) for role in held_out if has(role)}
        return JobData(Dataset(load("training"), load("replay") if has("replay") else ()), probes)

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
            dataset = dataset.with_columns(
                log_reference_N=await self._log_probs(dataset, self._spec.model_path, "the starting model")
            )
        if "behavior" in wanted and dataset.log_behavior_N is None:
            if self._spec.behavior_model_path is None:
                raise ConfigError(
                    "this weighting needs the data's own log-probabilities.",
                    param="behavior_model",
                    mend="Give each row `logprobs`, or name the SFT checkpoint that stands for the data.",
                )
            dataset = dataset.with_columns(
                log_behavior_N=await self._log_probs(
                    dataset, self._spec.behavior_model_path, "the model of the data"
                )
            )
        return dataset

    async def _log_probs(self, dataset: Dataset, model: Path, name: str) -> FloatArray:
        await self._journal.section("score", deadline_s=SCORING_DEADLINE_S)
        await self._journal.message(f"Scoring {len(dataset.samples)} samples under {name}.")
        return await score_dataset(
            dataset.samples,
            self._scoring_spec(model),
            cache_dir=self._spec.cache / "scores",
            num_scorers=self._config.resources.scorers,
            on_ray=self._placement.on_ray,
            deadline_s=SCORING_DEADLINE_S,
            progress=self._journal.progress("Scored {done:,} of {total:,} samples."),
        )

    def _scoring_spec(self, model: Path) -> ScoringSpec:
        resources = self._config.resources
        return ScoringSpec(
            model_path=str(model),
            dtype=resources.dtype,
            micro_batch_tokens=resources.micro_batch_tokens,
            cpus_per_worker=resources.cpus_per_worker,
            gpus_per_worker=resources.gpus_per_worker,
        )

    def _trainer_spec(self) -> TrainerSpec:
        return TrainerSpec(
            model_path=str(self._spec.model_path),
            objective=objective_of(self._config),
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

    async def _export(self, trainer: TrainerPool, dataset: Dataset) -> tuple[FloatArray, str]:
        """Write the model, and what its log-probabilities must be when somebody loads it."""
        await self._journal.section("export", deadline_s=3600)
        await trainer.export(self._export_path)
        groups = self._check_groups(dataset)
        scored = await trainer.score(groups)
        expected_N = np.empty(sum(map(len, scored)))
        for group in scored:  # a group gathers the rows of a prompt; the check reads them in the file's order
            expected_N[group.payload.index_N] = group.log_policy_N
        return expected_N, await trainer.weights_sha256()

    async def _check_export(self, dataset: Dataset, expected_N: FloatArray) -> None:
        """Load the export as a user would and compare. A model that differs is not a success."""
        samples = dataset.samples[:EXPORT_CHECK_SAMPLES]
        found_N = await score_dataset(
            samples,
            self._scoring_spec(self._export_path),
            cache_dir=None,
            num_scorers=1,
            on_ray=self._placement.on_ray,
            deadline_s=1800,
        )
        num_tokens_N = np.array([s.num_tokens for s in samples])
        off = float(np.max(np.abs(found_N - expected_N) / num_tokens_N))
        tolerance = EXPORT_TOLERANCE[self._config.resources.dtype]
        if not off <= tolerance:
            raise NumericsError(
                f"the exported model's log-probabilities differ from the trainer's by {off:.2e} nats per token"
                f" (allowed: {tolerance:.0e}).",
                mend="The checkpoint is intact; resume the job to export again, and report this.",
            )
        await self._journal.message(
            f"Export checked: within {off:.1e} nats per token.", export_error_nats=off
        )

    def _check_groups(self, dataset: Dataset) -> list[Group]:
        return probe_groups(dataset.samples[:EXPORT_CHECK_SAMPLES], self._placement.put)

    def _report(self) -> Path:
        from modeseek_ray.reports import write_report  # matplotlib: not before it is needed

        results = self._spec.directory / "results"
        return write_report(results, results / "report.html", self._spec.files["training_file"])

    def _record(self, status: str, **figures: Any) -> None:
        """`results/job.json`: what the report shows beside the curves."""
        self._job_record = replace(self._job_record, status=status, **figures)
        write_job(self._spec.directory / "results", self._job_record)


def objective_of(config: JobConfig) -> Objective:
    """The part of the weighting that the trainer applies: token factor, KL direction, aggregation."""
    weighting = config.weighting
    return Objective(
        aggregation=config.training.aggregation,
        token_factor=weighting.token.scheme,
        token_parameters=factor_parameters(weighting.token),
        kl_direction=None if weighting.kl is None else weighting.kl.direction,
    )
