"""One fine-tuning run in this process: the driver's loop and a rank's step, without Ray and DeepSpeed.

Weights come from `modeseek_ray.weights.weigh` over the whole batch, losses from `modeseek_ray.objectives`;
`test_forgetting.py` holds a run beside the service's trainer.

    N  samples of a batch      M  their trained tokens      R  rows of the training file, replay rows after them
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.inner import parts_of
from actors.lora import add_adapters
from modeseek_ray.data.cursor import Cursor
from modeseek_ray.methods import Lora
from modeseek_ray.objectives.collate import Batch, collate
from modeseek_ray.objectives.factors import TokenEvidence, token_factor
from modeseek_ray.objectives.loss import sum_by_sample, weighted_loss_sum
from modeseek_ray.objectives.model import Reference, ScoringModel
from modeseek_ray.objectives.parameters import factor_parameters
from modeseek_ray.types import Evidence, FloatArray, Sample, Weights
from modeseek_ray.weights import Weighting, kl_coefficient, needs, observe, weigh

STEPS, BATCH = 120, 32
REPLAY_SHARE = 1 / 16
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Setting:
    """Everything about how a run trains; JSON-serialisable by `asdict`."""

    weighting: Mapping[str, Any]  # as a user writes it under `method.weighted`
    learning_rate: float
    lora_rank: int | None = None
    replay_prior: float | None = None  # None = no replay rows
    shuffled: bool = False  # the control: right weights, wrong rows
    batches_at_once: int = 1  # weighed together, then as many inner steps
    data_reference: bool = False  # log mu-hat of the rows from an SFT checkpoint
    flow_share: float | None = None  # gamma = this / the file's median NLL under the start
    online: bool = False


@dataclass(frozen=True)
class Rows:
    """A training file with the figures of it that do not change while a run trains."""

    samples: Sequence[Sample]  # R, replay rows last
    log_reference_R: FloatArray
    log_data_R: FloatArray | None = None

    def median_initial_nll(self) -> float:
        """Over the file's new rows, of the mean NLL per trained token under the start, nats."""
        nll = [
            -log_prob / sample.num_tokens
            for sample, log_prob in zip(self.samples, self.log_reference_R, strict=True)
            if not sample.is_replay
        ]
        return float(np.median(nll))


@dataclass
class Step:
    """What one optimizer step did."""

    loss: float
    kl_nats: float | None
    num_tokens: int


@dataclass
class Course:
    """Figures of weighing since the last evaluation."""

    gamma: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)

    def take(self) -> dict[str, float | None]:
        means = {
            "gamma": float(np.mean(self.gamma)) if self.gamma else None,
            "ess_ratio": float(np.mean(self.ess)) if self.ess else None,
        }
        self.gamma, self.ess = [], []
        return means


class Learner:
    """A policy, its optimizer and its frozen start."""

    def __init__(self, model: Any, frozen: ScoringModel, setting: Setting, *, seed: int) -> None:
        """`model` is trained in place, on the device it is on."""
        torch.manual_seed(seed)
        self.weighting = weighting_of(setting)
        if setting.lora_rank is not None:
            lora = Lora(rank=setting.lora_rank, alpha=2.0 * setting.lora_rank)
            model = add_adapters(model, lora)
        for name, value in {"output_router_logits": False, "router_aux_loss_coef": 0.0}.items():
            if hasattr(model.config, name):
                setattr(model.config, name, value)
        self.module = ScoringModel(model).train()
        self._frozen = frozen
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=setting.learning_rate, weight_decay=0.0)
        self._token_parameters = factor_parameters(self.weighting.token)

    def forward(self, batch: Batch) -> Any:
        """Token scores of a batch with gradient, and what the objective asks of the start."""
        reference = None
        kl = self.weighting.kl
        if kl is not None:
            with torch.no_grad():
                hidden = self._frozen(*inputs(batch), keep_hidden=True).hidden_M
            reference = Reference(hidden, kl.direction, self._frozen.frozen_head())
        statistics = self.weighting.token.scheme == "eaft"
        return self.module(*inputs(batch), statistics=statistics, reference=reference)

    @torch.no_grad()
    def token_log_probs(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Of each sample's trained tokens, without gradient."""
        return token_log_probs(self.module, samples)

    def step(
        self,
        batch: Batch,
        scores: Any,
        values_N: FloatArray,
        *,
        coefficient: float = 0.0,
        log_start_M: Tensor | None = None,
        token_parameters: Mapping[str, float] = {},
    ) -> Step:
        """The service's step on one micro-batch that is the whole batch (`actors/policy.py`, `actors/loss.py`)."""
        num_tokens = len(batch.target_M)
        evidence = TokenEvidence(
            scores.log_prob_M.detach(), top_entropy_M=scores.top_entropy_M, log_start_M=log_start_M
        )
        factor_M = token_factor(
            self.weighting.token.scheme, evidence, {**self._token_parameters, **token_parameters}
        )
        loss = weighted_loss_sum(
            scores.log_prob_M,
            batch.sample_M,
            torch.from_numpy(values_N).to(batch.sample_M.device),
            factor_M,
            batch.num_tokens_B,
            "token",
            float(num_tokens),
        )
        kl_nats = None
        if scores.kl_M is not None:
            kl = scores.kl_M.double().sum() / num_tokens
            loss, kl_nats = loss + coefficient * kl, float(kl.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Step(float(loss.detach()), kl_nats, num_tokens)


class Run:
    """One run over a file, or over the policy's own answers. `finished` yields after every optimizer step."""

    def __init__(
        self,
        learner: Learner,
        setting: Setting,
        rows: Rows,
        *,
        seed: int,
        steps: int = STEPS,
        rounds: Callable[[Any, int], list[Sample]] | None = None,
    ) -> None:
        """`rounds(model, step)` writes and grades a round's samples, for online settings."""
        self._learner, self._setting, self._rows = learner, setting, rows
        self._seed, self._steps, self._rounds = seed, steps, rounds
        self._needs = needs(learner.weighting)
        self._state: Mapping[str, Any] = {}
        self.course = Course()
        self.weights: Weights | None = None  # of the last batch
        self.cpu_s = 0.0  # of training, evaluations left out

    def finished(self) -> Iterator[tuple[int, Step | None]]:
        """(optimizer steps so far, what the last did); None for a round that had nothing to learn from."""
        done = 0
        for number, index_N in enumerate(self._batches()):
            for step in self._train(number, index_N, done):
                done += 1
                yield done, step
                if done == self._steps:
                    return

    def _batches(self) -> Iterator[Any]:
        samples, at_once = self._rows.samples, self._setting.batches_at_once
        if self._setting.online:
            yield from (None for _ in range(self._steps))
            return
        use_replay = self._setting.replay_prior is not None
        chosen = [i for i, s in enumerate(samples) if use_replay or not s.is_replay]
        cursor = Cursor(
            np.array([samples[i].group for i in chosen]),
            BATCH * at_once,
            seed=self._seed,
            max_steps=-(-self._steps // at_once),
            is_replay_N=np.array([samples[i].is_replay for i in chosen]) if use_replay else None,
            replay_share=REPLAY_SHARE if use_replay else 0.0,
        )
        yield from cursor

    def _train(self, number: int, index_N: Any, done: int) -> Iterator[Step | None]:
        begun = time.process_time()
        if index_N is None:
            assert self._rounds is not None
            samples = self._rounds(self._learner.module.model, number)
            log_data_N = log_reference_N = None
        else:
            samples = [self._rows.samples[i] for i in index_N]
            log_reference_N = self._rows.log_reference_R[index_N]
            log_data = self._rows.log_data_R
            log_data_N = None if log_data is None else log_data[index_N]
        if not samples:
            self.cpu_s += time.process_time() - begun
            yield None
            return
        inner = self._setting.batches_at_once
        if inner > 1:
            start_N = self._learner.token_log_probs(samples)
            log_policy_N = np.array([float(x.double().sum()) for x in start_N])
            weights = self._weigh(samples, log_policy_N, log_reference_N, log_data_N, done)
            for part in parts_of(len(samples), inner, seed=(self._seed, number)):
                batch = self._collate(samples, part)
                log_start_M = torch.cat([start_N[i] for i in part])
                scores = self._learner.forward(batch)
                step = self._step(batch, scores, weights, weights.values_N[part], log_start_M)
                self.cpu_s += time.process_time() - begun
                yield step
                begun = time.process_time()
            return
        batch = self._collate(samples, range(len(samples)))
        scores = self._learner.forward(batch)
        log_policy_N = sum_by_sample(scores.log_prob_M, batch.sample_M, len(samples)).cpu().numpy()
        weights = self._weigh(samples, log_policy_N, log_reference_N, log_data_N, done)
        step = self._step(batch, scores, weights, weights.values_N, None)
        self.cpu_s += time.process_time() - begun
        yield step

    def _collate(self, samples: Sequence[Sample], picks: Sequence[int] | np.ndarray) -> Batch:
        return collate(samples, picks, pad_id=0).to(self._learner.module.model.device)

    def _weigh(
        self,
        samples: Sequence[Sample],
        log_policy_N: FloatArray,
        log_reference_N: FloatArray | None,
        log_data_N: FloatArray | None,
        done: int,
    ) -> Weights:
        prior = self._setting.replay_prior or 1.0
        group_N = [i if s.group < 0 else len(samples) + s.group for i, s in enumerate(samples)]
        has_rewards = any(s.reward is not None for s in samples)
        evidence = Evidence(
            log_policy_N=log_policy_N if "policy" in self._needs else None,
            log_reference_N=log_reference_N if "initial" in self._needs else None,
            log_behavior_N=log_data_N if "behavior" in self._needs else None,
            num_tokens_N=np.array([s.num_tokens for s in samples]),
            rewards_N=np.array([np.nan if s.reward is None else s.reward for s in samples])
            if has_rewards
            else None,
            group_N=np.unique(group_N, return_inverse=True)[1],
            prior_N=np.array([prior if s.is_replay else s.prior for s in samples]),
            is_replay_N=np.array([s.is_replay for s in samples]),
        )
        weights = weigh(
            evidence, self._learner.weighting, progress=done / self._steps, state=self._state or None
        )
        if weights.gamma is not None:
            self.course.gamma.append(weights.gamma)
        self.course.ess.append(weights.ess_ratio)
        if self._setting.shuffled:
            order_N = np.random.default_rng((self._seed, done)).permutation(len(samples))
            weights = replace(weights, values_N=weights.values_N[order_N])
        self.weights = weights
        return weights

    def _step(
        self, batch: Batch, scores: Any, weights: Weights, values_N: FloatArray, log_start_M: Tensor | None
    ) -> Step:
        kl = self._learner.weighting.kl
        step = self._learner.step(
            batch,
            scores,
            values_N,
            coefficient=kl_coefficient(kl, self._state),
            log_start_M=log_start_M,
            token_parameters=weights.token_parameters,
        )
        measured = None if step.kl_nats is None else {"kl_nats": step.kl_nats}
        self._state = observe(weights.state, kl=kl, **(measured or {}))
        return step


def weighting_of(setting: Setting) -> Weighting:
    """What the setting's `weighting` says, checked as a job's is."""
    return Weighting.model_validate(dict(setting.weighting))


def with_median(setting: Setting, rows: Rows) -> Setting:
    """FLOW's gamma is a figure of the file: write it in."""
    if setting.flow_share is None:
        return setting
    gamma = setting.flow_share / rows.median_initial_nll()
    likelihood = {**setting.weighting.get("likelihood", {}), "gamma": gamma}
    return replace(setting, weighting={**setting.weighting, "likelihood": likelihood})


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.input_ids_BS, batch.attention_mask_BS, batch.positions_M, batch.target_M


@torch.no_grad()
def token_log_probs(module: ScoringModel, samples: Sequence[Sample], *, at_once: int = 256) -> list[Tensor]:
    """Of each sample's trained tokens, in order."""
    found: list[Tensor] = []
    for first in range(0, len(samples), at_once):
        picks = range(first, min(first + at_once, len(samples)))
        batch = collate(samples, picks, pad_id=0).to(module.model.device)
        found.extend(module(*inputs(batch)).log_prob_M.split(batch.num_tokens_B.tolist()))
    return found


def summed_log_probs(module: ScoringModel, samples: Sequence[Sample]) -> FloatArray:
    """log p of each row, [R] nats."""
    return np.array([float(x.double().sum()) for x in token_log_probs(module, samples)])
