"""One attempt at an online job: rounds of sample, grade, weigh, train, and the weights handed back.

Trainers, engines and scorers are placed together before the first of them starts. Trainers are set
up first: in one process they and the engine share torch's process group.
"""

from __future__ import annotations

from typing import Any

from actors.answers import Answerer
from actors.attempt import EXPORT_CHECK_SAMPLES, Attempt
from actors.attempt_spec import AttemptResult
from actors.canary import tokens_to_reach
from actors.generator import GeneratorSpec, Sampling
from actors.generator_pool import GeneratorPool
from actors.grading import Grading
from actors.pools import TrainerPool
from actors.rollout_source import RolloutSource
from actors.rollouts import RolloutStore
from actors.scorers import ScorerPool
from actors.transfers import IpcTransfer, MemoryTransfer, NcclTransfer, Transfer
from actors.weight_sync import VerifiedChannel
from modeseek_ray.config import JobConfig, OnlineMethod
from modeseek_ray.data.auto import ResolvedTraining, resolve_training
from modeseek_ray.data.prompts import load_prompts
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.reports.rows import steering_of
from modeseek_ray.weights import needs

# What an engine calls what a job calls `resources.weight_transfer`.
TRANSFERS = {"object_store": "chunks", "nccl": "nccl", "ipc": "ipc"}


class OnlineAttempt(Attempt):
    """Runs an `AttemptSpec` whose method is `online` or `reinforcement`."""

    async def _run(self) -> AttemptResult:
        tokenizer = ChatTokenizer(self._spec.model_path)
        prompts = load_prompts(
            self._spec.files["training_file"],
            tokenizer,
            max_tokens=self._max_length - self._online.rollout.max_tokens,
        )
        probes = self._probes(tokenizer)
        training = await self._resolve_rounds(len(prompts))
        plan = self._plan(training, training.total_steps)
        grading = Grading.of(self._config, self._spec.endpoints, self._spec.judges)
        trainer, generator, reference = await self._workers(grading)
        grader = await grading.start(self._placement)
        try:
            source = RolloutSource(
                prompts,
                self._online.rollout,
                Answerer(
                    generator,
                    grader,
                    tokenizer,
                    max_failed_share=self._online.rollout.max_failed_share,
                ),
                RolloutStore(self._spec.directory / "rollouts"),
                self._placement.put,
                self._journal,
                rounds=plan.total_steps,
                seed=self._config.seed,
                steering=steering_of(self._config.model_dump(mode="json", exclude_unset=True))
                or "low_is_unmastered",
            )
            channel = VerifiedChannel(
                trainer,
                generator,
                [p.token_ids_T for p in prompts[:64]],
                trainer_dtype=self._config.resources.dtype,
                sync_tokens=tokens_to_reach(self._model.num_experts),
                # Under R0 the trainer scores by the start's experts, which are not those that wrote the sample.
                transfer=await self._transfer(trainer, generator),
                holds_samples=self._online.mismatch is None and self._online.routing_replay != "R0",
            )
            driver = await self._driver(plan, source, trainer, probes, reference=reference, channel=channel)
            await self._start(generator, channel)
            outcome = await driver.run()
            if outcome.ended != "run":
                return self._stopped(outcome)
            exported = await self._export(trainer, source.recent(EXPORT_CHECK_SAMPLES))
        finally:
            await grader.close()
            await generator.close()
            if reference is not None:
                await reference.close()
            await trainer.close()
            await self._placement.close()
        rollouts = RolloutStore(self._spec.directory / "rollouts").gathered(
            self._spec.directory / "results" / "rollouts.parquet", plan.total_steps
        )
        return await self._succeed(outcome, exported, training, rollouts)

    @property
    def _online(self) -> OnlineMethod:
        online = self._config.online
        if online is None:
            raise TypeError(f"{self._config.method.type} is not an online job")
        return online

    async def _workers(self, grading: Grading) -> tuple[TrainerPool, GeneratorPool, ScorerPool | None]:
        """Places for all, then handles to all; nothing is loaded yet."""
        resources = self._config.resources
        # One process needs no NCCL, and lends nothing to itself.
        changes = {} if self._placement.on_ray else {"transfer": "chunks"}
        spec = generator_spec(self._config, str(self._spec.model_path), self._max_length, **changes)
        scorers = resources.scorers if "initial" in needs(self._config.weighting) else 0
        await self._placement.reserve(
            trainers=resources.trainers,
            generators=resources.generators,
            generator=spec,
            scorers=scorers,
            classifiers=grading.seats(),
        )
        trainer = await self._placement.trainers(self._trainer_spec(), resources.trainers)
        reference = None
        if scorers:
            reference = await self._placement.scorers(
                self._scoring_spec(self._spec.model_path, with_routes=True), scorers
            )
        generator = await self._placement.generators(spec, resources.generators)
        generator.make_room = trainer.free_cache
        return trainer, generator, reference

    async def _transfer(self, trainer: TrainerPool, generator: GeneratorPool) -> Transfer:
        """How weights will travel. Engines were told as they were placed."""
        if generator.spec.transfer == "nccl":
            return NcclTransfer(trainer, generator, *await self._placement.meeting())
        if generator.spec.transfer == "ipc":
            return IpcTransfer(trainer, generator)
        return MemoryTransfer(trainer, generator)

    async def _start(self, generator: GeneratorPool, channel: VerifiedChannel) -> None:
        """Load the engines, and see that they agree with the trainer before anything is sampled."""
        await self._journal.section("setup", deadline_s=1800)
        facts = await generator.setup()
        agreed = await channel.verify()
        await self._journal.message("Generators are ready and agree with the trainer.", **{**facts, **agreed})

    async def _resolve_rounds(self, num_prompts: int) -> ResolvedTraining:
        """Rounds and learning rate, every "auto" replaced."""
        training, messages = resolve_training(
            self._config.training,
            num_rows=num_prompts * self._online.rollout.samples_per_prompt,
            num_parameters=self._model.num_parameters,
            has_lora=self._config.training.lora is not None,
        )
        for text in messages:
            await self._journal.message(text)
        return training


def generator_spec(config: JobConfig, model_path: str, max_length: int, **changes: Any) -> GeneratorSpec:
    """What the engines of a job that writes samples need to know."""
    rollout, resources, online = config.rollout, config.resources, config.online
    if rollout is None:
        raise TypeError(f"{config.method.type} writes no samples")
    fields: dict[str, Any] = {
        "model_path": model_path,
        "sampling": Sampling(
            samples_per_prompt=rollout.samples_per_prompt,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_tokens,
            stop=tuple(rollout.stop),
        ),
        "dtype": resources.dtype if resources.generator_dtype == "auto" else resources.generator_dtype,
        "seed": config.seed,
        "max_length": max_length,
        "with_routes": online is not None and online.routing_replay in ("R2", "R3"),
        "ratios_used": online is not None and online.uses_ratios,
        "kv_cache_gib": None if resources.gpus_per_worker else resources.kv_cache_gib,
        "tensor_parallel": resources.tensor_parallel,
        "expert_parallel": resources.expert_parallel,
        "transfer": "chunks" if online is None else TRANSFERS[resources.weight_transfer],
        "sleeps": resources.colocated and online is not None,
        "cpus_per_worker": resources.cpus_per_worker,
        "gpus_per_worker": resources.gpus_per_worker,
    }
    return GeneratorSpec(**{**fields, **changes})
