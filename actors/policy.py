"""The policy on one rank: score, step, evaluate, export. Blind to how samples came by their weights.

N  this rank's samples      B  samples of one micro-batch      M  trained tokens of a micro-batch
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors import modeling
from actors.allocator import return_memory_at_embeddings
from actors.attention import make_repeatable
from actors.begun import Begun, Measured, compared_with_writers, require
from actors.distance import StartWeights
from actors.engine import COLLECTIVE_TIMEOUT, ZeroEngine, deepspeed_config, join, norm_after_clipping
from actors.export import write_export
from actors.forward import ForwardPasses, Routing, log_probs, needs_reference
from actors.lora import adapters_off
from actors.loss import announced_gradient, loss_share
from actors.messages import RankBeginning, RankEvaluation, RankReport
from actors.passes import StepPasses
from actors.rng import seed_everything
from actors.sequence import SequenceGroup
from actors.start import Start
from actors.tally import Seconds, Tally
from actors.ulysses import parallelise, probe, verify
from actors.weight_chunks import ChunkFacts, WeightChunk
from actors.weights_out import token_log_probs, weight_chunks
from modeseek_ray.errors import ConfigError, NumericsError
from modeseek_ray.objectives.collate import Batch
from modeseek_ray.objectives.model import ScoringModel, unwrap
from modeseek_ray.routing.hooks import record_routes
from modeseek_ray.types import FloatArray, IntArray, Sample, StepPlan

if TYPE_CHECKING:
    from actors.ipc_transfer import IpcLender
    from actors.nccl_transfer import NcclSender
    from actors.trainer import TrainerSpec


class Policy:
    """One rank's share of the trained model. Every method is collective over the ranks."""

    def __init__(self, spec: TrainerSpec, rank: int, world_size: int) -> None:
        self._spec = spec
        self._rank = rank
        on_gpu = spec.resources.gpus_per_worker > 0
        _check(spec, on_gpu)
        torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
        if on_gpu:
            torch.cuda.set_device(0)
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Otherwise every new tensor is filled with NaN first, against code that reads what it did not write.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            make_repeatable()
        join(rank, world_size, cuda=on_gpu)
        seed_everything(spec.seed)  # alike on every rank: adapters start from the same random matrices
        self._module = self._build()
        if not on_gpu:
            return_memory_at_embeddings(unwrap(self._module.model).get_input_embeddings())
        self._counts = [
            sum(p.numel() for p in self._module.parameters() if p.requires_grad or not trainable)
            for trainable in (False, True)
        ]
        has_dropout = modeling.is_stochastic(self._module.model)
        _check_model(spec, self._module, has_dropout)
        self._sequence = SequenceGroup(spec.resources.sequence_parallel, rank, world_size, COLLECTIVE_TIMEOUT)
        expected = probe(self._module, self._sequence)
        parallelise(self._module, spec.resources, self._sequence)
        # Without an adapter to switch off, pi_0 beside the policy is a second set of weights.
        frozen = None
        if needs_reference(spec.objective) and spec.training.lora is None:
            frozen = modeling.frozen_copy(self._module)
        self.engine = ZeroEngine(
            self._module,
            deepspeed_config(
                spec.training, spec.resources, cuda=on_gpu, persistence_threshold=spec.persistence_threshold
            ),
            world_size,
        )
        if frozen is not None:
            frozen.to(self.engine.device)
        verify(self._module, self.engine, self._sequence, expected)
        self._passes = ForwardPasses(
            self.engine, self._module, spec.objective, spec.resources, self._sequence, frozen
        )
        self._start = Start()
        self._start_weights = StartWeights(self.engine, self._module.model, rank, world_size)
        self._step_passes = StepPasses(
            self._passes,
            self.engine,
            spec,
            keeps_graphs=not has_dropout and spec.training.inner_steps == 1,
        )
        self._begun = Begun()
        self._seconds = Seconds()
        self._sender: NcclSender | None = None
        self._lender: IpcLender | None = None
        seed_everything(spec.seed + rank)  # dropout differs between ranks

    def _build(self) -> ScoringModel:
        spec = self._spec
        return modeling.prepare_for_training(
            modeling.build_trainable(spec.model_path, spec.resources.dtype, spec.training),
            temperature=spec.objective.temperature,
            gradient_checkpointing=spec.resources.gradient_checkpointing,
        )

    def describe(self) -> dict[str, Any]:
        """What was built, for the job's log."""
        return {
            "parameters": self._counts[0],
            "trainable_parameters": self._counts[1],
            "zero_stage": self.engine.zero_stage,
            "dtype": self._spec.resources.dtype,
            "device": str(self.engine.device),
            "ranks": torch.distributed.get_world_size(),
            "sequence_parallel": self._sequence.size,
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
        }

    def remember_start(self, samples: Sequence[Sample]) -> None:
        """Keep what exact KL to the policy as it is now needs on these samples."""
        self._step_passes.let_go()
        with self.engine.whole(*self._module.head.parameters()):
            head = self._module.frozen_head()
        self._start.remember(samples, self._passes.infer(samples, keep_hidden=True), head)

    def score(self, samples: Sequence[Sample]) -> FloatArray:
        """log pi_theta summed over trained tokens, [N] float64, without dropout; may keep graphs for `step`.

        Under R0 the routes are pi_0's, and no graph is kept: steps route live.
        """
        self._seconds = Seconds()
        with self._seconds.measure("score"):
            if self._spec.objective.routing_replay == "R0":
                return log_probs(len(samples), self._step_passes.under_start_routes(samples))
            return log_probs(len(samples), self._step_passes.scoring(samples))

    def score_live(self, samples: Sequence[Sample]) -> FloatArray:
        """The same as somebody computes who loads the export: every router chooses for itself."""
        self._step_passes.let_go()
        return log_probs(len(samples), self._passes.infer(samples))

    def begin(self, samples: Sequence[Sample]) -> RankBeginning:
        """`score`, keeping on this rank what steps on any of these samples are compared with.

        That is each token's log-probability and, for R2, the routes taken: of the policy as it is now,
        whoever wrote the samples. It is the clip's pi_old, but for samples that older weights wrote while
        no `mismatch` corrects for them: there the clip goes by the writer's own log-probabilities
        (`objectives/README.md`).

        R3 replays the sampler's routes here and in the steps; with `compare_routes` a second pass, without
        gradient, measures what live routes would have been. R0's log pi_theta is of a pass of its own, under
        pi_0's routes: what steps are compared with is routed as they are, live.
        """
        self._begun.clear()
        self._seconds = Seconds()
        replay = self._spec.objective.routing_replay
        carried = any(s.routes_TLK is not None for s in samples)
        if self._spec.objective.mismatch is not None:
            require(
                samples, "log_behavior_T", "log-probabilities of its sampler, which `mismatch` corrects for"
            )
        measured = Measured(samples, self._spec.objective)
        log_policy_N = None
        with self._seconds.measure("score"):
            if replay == "R0":
                log_policy_N = log_probs(len(samples), self._step_passes.under_start_routes(samples))
            if replay == "R3" and self._spec.compare_routes:  # first: no pass may come after kept graphs
                measured.add_live(self._passes.infer(samples, routing=Routing(record=True)))
            record = replay == "R2" or (replay in (None, "R0") and carried)
            if self._spec.objective.sample_kl:  # before graphs are kept, likewise
                measured.add_distances(self._passes.infer(samples, start_kl=True))
            over_start = self._spec.objective.delta_over_start
            for forward in self._step_passes.scoring(samples, record=record, log_reference=over_start):
                self._begun.keep(samples, forward)
                measured.add(forward)
        result = measured.result()
        return result if log_policy_N is None else replace(result, log_policy_N=log_policy_N)

    def score_reference(self, samples: Sequence[Sample]) -> FloatArray:
        """log pi_0, [N] float64, with the adapter off."""
        self._step_passes.let_go()
        with adapters_off(self._module.model):
            return log_probs(len(samples), self._passes.infer(samples))

    def step(self, samples: Sequence[Sample], plan: StepPlan) -> RankReport:
        """One optimizer step: the same operations in the same order whether or not graphs were kept.

        The samples may be any part of those that were begun. Raises RuntimeError if the objective looks
        back and they were not.
        """
        if len(plan.values_N) != len(samples):
            raise ValueError(f"{len(plan.values_N)} weights for {len(samples)} samples")
        past_N = self._begun.of(samples)
        if past_N is None and self._spec.objective.looks_back:
            raise RuntimeError("the objective looks back: call begin() with these samples before step()")
        if (
            past_N is not None
            and self._spec.objective.clip is not None
            and self._spec.objective.mismatch is None
        ):
            past_N = compared_with_writers(samples, past_N, plan.step)
        seconds, self._seconds = self._seconds, Seconds()
        count, forwards = self._step_passes.of_step(samples, past_N, partial(self._announce, plan))
        num_tokens = self._total(sum(s.num_tokens for s in samples))
        num_positions = 0
        if self._spec.objective.router_aux_loss_coef > 0:
            num_positions = self._total(sum(s.length for s in samples))
        tally = Tally()
        for position in range(count):
            with seconds.measure("forward"):
                forward = next(forwards)
                share = loss_share(self._spec.objective, plan, forward, past_N, num_tokens, num_positions)
                tally.add(forward, share)
            with seconds.measure("backward"):
                self.engine.backward(share.loss, last=position == count - 1)
            del forward, share  # the graph, before the next one is built
        self._refuse_nonfinite(tally.nonfinite, samples, plan.step, "log-probability")
        with seconds.measure("optimizer"):
            grad_norm = self.engine.step(plan.learning_rate)
        if not math.isfinite(grad_norm):
            self._refuse_nonfinite(range(len(samples)), samples, plan.step, "gradient")
        clipped = norm_after_clipping(grad_norm, self._spec.training.max_grad_norm)
        return tally.report(grad_norm, clipped, seconds)

    def _announce(self, plan: StepPlan, index_B: IntArray, batch: Batch) -> Tensor | None:
        return announced_gradient(self._spec.objective, plan, index_B, batch, self.engine.loss_scale)

    def evaluate(self, samples: Sequence[Sample], *, kl: bool) -> RankEvaluation:
        """Sums per sample, without dropout. `kl`: exact KL(pi_0 || pi) and KL(pi || pi_0) of remembered samples."""
        self._step_passes.let_go()
        nll_N, num_correct_N, entropy_N, kl_N, kl_reverse_N = (np.zeros(len(samples)) for _ in range(5))

        def start(chosen: Sequence[Sample]) -> Any:
            return self._start.reference(chosen, self.engine.device)

        for forward in self._passes.infer(samples, entropy=True, reference_of=start if kl else None):
            scores = forward.scores
            nll_N[forward.index_B] = -forward.by_sample(scores.log_prob_M)
            num_correct_N[forward.index_B] = forward.by_sample(scores.correct_M)
            for column_N, column_M in (
                (entropy_N, scores.entropy_M),
                (kl_N, scores.kl_M),
                (kl_reverse_N, scores.kl_reverse_M),
            ):
                if column_M is not None:
                    column_N[forward.index_B] = forward.by_sample(column_M)
        num_tokens_N = np.array([s.num_tokens for s in samples], dtype=np.int64)
        correct_N = num_correct_N.astype(np.int64)
        return RankEvaluation(
            nll_N=nll_N,
            num_correct_N=correct_N,
            num_tokens_N=num_tokens_N,
            all_correct_N=(correct_N == num_tokens_N) & (num_tokens_N > 0),
            problem_N=np.array([s.problem for s in samples], dtype=np.int64),
            tasks=tuple(s.task for s in samples),
            entropy_N=entropy_N,
            kl_N=kl_N if kl else None,
            kl_reverse_N=kl_reverse_N if kl else None,
        )

    def distance_from_start(self) -> float:
        """Norm of theta - theta_0 over all trained parameters; of the merged weights with LoRA."""
        return self._start_weights.distance()

    def save(self, directory: Path) -> None:
        self.engine.save(directory)

    def load(self, directory: Path) -> str | None:
        self._step_passes.let_go()
        self._begun.clear()
        return self.engine.load(directory)

    def export(self, directory: Path) -> None:
        """Gather the trained weights into a copy of the model on rank 0 and write that."""
        copy, own = None, {}
        if self._rank == 0:
            spec = self._spec
            with torch.random.fork_rng():
                copy = modeling.build_trainable(spec.model_path, spec.resources.dtype, spec.training)
            own = dict(copy.named_parameters())
        for name, tensor in self.engine.parameters(self._module.model, trainable_only=True):
            if copy is not None:
                own[name].data.copy_(tensor)
        if copy is not None:
            write_export(copy, Path(self._spec.model_path), directory)
        self.engine.barrier()

    def weights(self, *, copied_at_once: bool) -> Iterator[WeightChunk | ChunkFacts]:
        """All weights as a checkpoint would hold them, from rank 0; see `weights_out`."""
        sends = self._rank == 0
        return weight_chunks(self.engine, self._module, sends=sends, copied_at_once=copied_at_once)

    def canary(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]:
        """Log-probability of each token but the first, at temperature one; the same on every rank."""
        temperature = self._spec.objective.temperature
        return token_log_probs(self._passes, self._module, sequences, temperature=temperature)

    def transfer(self) -> NcclSender:
        """This rank's part of sending weights from GPU to GPU."""
        if self._sender is None:
            from actors.nccl_transfer import NcclSender  # loads vLLM

            self._sender = NcclSender(self.engine, self._module, self._rank)
        return self._sender

    def lender(self) -> IpcLender:
        """This rank's part of handing weights to an engine on its own GPU."""
        if self._lender is None:
            from actors.ipc_transfer import IpcLender

            self._lender = IpcLender(self.engine, self._module)
        return self._lender

    def free_cache(self) -> None:
        """Give back to the GPU what torch keeps for its next tensors."""
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def weights_sha256(self) -> str:
        return self.engine.sha256(self._module.model)

    def _total(self, value: int) -> int:
        """The sum over the global batch: ranks that share samples count them once."""
        return self.engine.total(value) // self._sequence.size

    def _refuse_nonfinite(
        self, positions: Sequence[int], samples: Sequence[Sample], step: int, what: str
    ) -> None:
        """Raise `NumericsError` on every rank, naming rows of all of them, if any rank found something."""
        if self.engine.maximum(len(positions)) == 0:
            return
        rows = sorted({r for part in self.engine.collect([samples[i].row for i in positions]) for r in part})
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise NumericsError(
            f"step {step}: the {what} of row(s) {', '.join(map(str, rows[:8]))}{more} is not finite;"
            " no weight was changed.",
            mend="Lower the learning rate, or look at these rows; the last checkpoint is intact.",
        )


def _check(spec: TrainerSpec, on_gpu: bool) -> None:
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "the job asks for GPUs, and torch finds none in this process.",
            param="resources.gpus_per_worker",
            mend="Set it to 0, or install the CUDA requirements.",
        )


def _check_model(spec: TrainerSpec, module: ScoringModel, has_dropout: bool) -> None:
    if has_dropout and spec.resources.keep_graph == "always":
        raise ConfigError(
            "scoring is done without dropout, so its graph cannot serve a step with dropout.",
            param="resources.keep_graph",
            mend='Use "auto", or set the model\'s dropout to zero in its config.json.',
        )
    if spec.training.inner_steps > 1 and spec.resources.keep_graph == "always":
        raise ConfigError(
            "the graph of a whole batch cannot serve steps on its parts.",
            param="resources.keep_graph",
            mend='Use "auto", or training.inner_steps: 1.',
        )
    if has_dropout and (spec.objective.clip is not None or spec.objective.token_factor == "psft"):
        raise ConfigError(
            "with dropout two passes of one policy differ, and so would the token ratios that are clipped.",
            param="model",
            mend="Set the model's dropout to zero in its config.json, or drop the clip.",
        )
    if spec.objective.routing_replay is not None:
        record_routes(module)  # raises for a dense model, and for one whose routes cannot be had
