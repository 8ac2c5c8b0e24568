"""What a job may do: a training method each, with the block of the same name under `method:`.

Strict like all of `JobConfig`: every field says what it does and its unit.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from modeseek_ray.objectives.parameters import Clip, MismatchSection
from modeseek_ray.rewards import GraderSection
from modeseek_ray.strict import Strict
from modeseek_ray.weights import Weighting, needs, uses_likelihood

Auto = Literal["auto"]


class Lora(Strict):
    """Low-rank adapters: only they are trained; the reference is the same model with them off."""

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    """Scale of the update: the adapter adds alpha/rank * B A."""
    target_modules: list[str] | Auto = "auto"
    """Linear layers to adapt; "auto" takes the attention projections."""
    target_experts: bool = False
    """Also adapt the expert matrices of an MoE model (they are parameters, not modules)."""


class Training(Strict):
    """The optimisation, whatever the weighting."""

    epochs: int | Auto = Field("auto")
    """Passes over the training file."""
    batch_size: int | Auto = Field("auto")
    """Samples per optimizer step, over all ranks and accumulation."""
    learning_rate: float | Auto = "auto"
    """Peak learning rate; "auto" is base(model size, LoRA) x learning_rate_multiplier."""
    learning_rate_multiplier: float | Auto = "auto"
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    """Stop after this many steps even if epochs remain."""
    warmup_share: float = Field(0.0, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at zero."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip the global gradient norm at this value."""
    max_length: int | None = Field(None, ge=2, le=10_000_000)
    """Longest sample in tokens; None = what the model allows."""
    truncate: bool = False
    """Cut longer samples (and count them) instead of refusing the file."""
    aggregation: Literal["token", "sequence", "sum"] = "token"
    """Divide the loss by trained tokens, average within each sample first, or sum each sample's tokens and
    average over samples. Preference pairs are of whole responses: there `sum` is the default."""
    inner_steps: int = Field(1, ge=1, le=1024)
    """Optimizer steps on each weighed batch: it is cut into as many mini-batches; weights stay as they are."""
    router_aux_loss_coef: float = Field(0.0, ge=0, le=10)
    """MoE: coefficient of the load-balancing loss of the Switch Transformer, added to the loss; 0 = off. Counted
    on live routes, one micro-batch at a time, as transformers does."""
    lora: Lora | None = None
    replay_share: float = Field(0.0, ge=0, lt=1)
    """Share of each batch taken from `replay_file`."""
    evaluate_every: int | Auto = "auto"
    """Steps between evaluations; "auto" is ten times in the job. Also before the first and after the last step."""
    checkpoint_every: int | Auto = "auto"
    """Steps between checkpoints; "auto" is four times in the job, and at the end."""
    keep_checkpoints: int = Field(2, ge=2, le=100)
    async_checkpoints: bool = False
    """Hash, flush and commit a checkpoint while the next steps are trained."""

    @model_validator(mode="after")
    def _ranges(self) -> Training:
        for name in ("epochs", "batch_size", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= 1_000_000:
                raise ValueError(f'{name} must be "auto" or between 1 and 1000000, not {value}')
        for name in ("learning_rate", "learning_rate_multiplier"):
            value = getattr(self, name)
            if value != "auto" and not 0 < value <= 100:
                raise ValueError(f'{name} must be "auto" or in (0, 100], not {value}')
        return self


class WeightedMethod(Weighting):
    """`method.weighted`: how much each sample counts, and the training."""

    routing_replay: Literal["R0"] | None = None
    """MoE: score the policy under the experts the frozen start asks (R0), so that a ratio to the start is not one
    of routings. Steps and evaluations route live."""
    training: Training = Training()

    @model_validator(mode="after")
    def _inner_loop(self) -> WeightedMethod:
        _refuse_start_routes_without_ratio(self, self.routing_replay)
        if self.token.scheme == "psft" and self.training.inner_steps == 1:
            raise ValueError(
                "psft compares with the policy at the start of an inner loop, and with one step per batch it is"
                " SFT; set training.inner_steps, 8 for example"
            )
        return self


def _refuse_start_routes_without_ratio(weighting: Weighting, routing_replay: str | None) -> None:
    if routing_replay == "R0" and not {"policy", "initial"} <= needs(weighting):
        raise ValueError(
            "routing_replay R0 is for ratios to the start, and this weighting has none; drop it, or choose"
            " likelihood.of: policy_over_initial or initial_over_policy"
        )


class Hyperparameters(Strict):
    """OpenAI's three knobs."""

    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    n_epochs: int | Auto = "auto"


class SupervisedMethod(Strict):
    """`method.supervised`: every sample counts by its prior alone."""

    hyperparameters: Hyperparameters = Hyperparameters()
    training: Training = Training()


class DpoHyperparameters(Hyperparameters):
    """OpenAI's knobs of preference training; `batch_size` counts pairs."""

    beta: float | Auto = "auto"
    """How closely the policy keeps to the start while it learns the preferences; "auto" is 0.1."""

    @model_validator(mode="after")
    def _range(self) -> DpoHyperparameters:
        if self.beta != "auto" and not 0 < self.beta <= 100:
            raise ValueError(f'beta must be "auto" or in (0, 100], not {self.beta}')
        return self


class DpoMethod(Strict):
    """`method.dpo`: direct preference optimisation on rows of a preferred and a non-preferred output."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()
    training: Training = Training()


class Rollout(Strict):
    """How samples are written: by the generator, round by round."""

    samples_per_prompt: int = Field(8, ge=1, le=1024)
    """N: completions of each prompt; they are the group that rewards are compared within."""
    prompts_per_round: int = Field(16, ge=1, le=65536)
    """Prompts of a round; a round's samples are one global batch."""
    temperature: float = Field(1.0, ge=0, le=10)
    """The trainer divides its logits by the same number, so that ratios compare like with like."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampler; below 1 only where no token ratios are used (the cut changes probabilities)."""
    max_tokens: int = Field(256, ge=1, le=1_000_000)
    """Most tokens of a completion."""
    stop: list[str] = Field(default=[], max_length=16)
    """Texts that end a completion, besides the end token."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Steps the generator may run ahead: 0 is strictly on-policy, more overlaps writing with training.
    Samples older than this are dropped and counted."""
    ties: Literal["skip", "keep", "resample"] = "skip"
    """Groups whose rewards are all the same tell nothing: leave them out, train on them anyway, or leave
    them out and ask as many further prompts once."""
    steer: float = Field(0.0, ge=0, le=1)
    """How much later rounds ask what earlier weights call for: 0 = shuffled epochs, 1 = prompts drawn wholly by
    their mean weight, those not mastered first. Needs a likelihood ratio; below 1 no prompt is left out."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Stop the job when the grader fails on a larger share of a round's samples than this."""

    @property
    def samples_per_round(self) -> int:
        return self.prompts_per_round * self.samples_per_prompt


class OnlineMethod(Weighting):
    """`method.online`: rounds of sample, grade, weigh, train, and the new weights back to the generator."""

    grader: GraderSection
    """Who gives the reward."""
    rollout: Rollout = Rollout()
    clip: Clip | Auto | None = "auto"
    """What becomes of stale token ratios; "auto" is ppo where a batch takes several steps or may be stale."""
    mismatch: MismatchSection | None = None
    """Correct for the difference between trainer and engine. Without it, samples on which the two differ by more
    than their dtypes explain stop the job (`numerics`)."""
    routing_replay: Literal["R0", "R2", "R3"] | None = None
    """MoE: train under the routes the sampler took (R3), or the trainer took when the round began (R2). R0 trains
    live and scores the policy under the experts the frozen start asks, for a ratio to the start."""
    compare_routes: bool = False
    """With R3: also count each round where the trainer's own routers would choose other experts (one more
    forward pass)."""
    training: Training = Training()
    """`epochs` counts passes over the prompts, `max_steps` rounds; the batch is the round's samples."""

    @model_validator(mode="after")
    def _consistent(self) -> OnlineMethod:
        _refuse_start_routes_without_ratio(self, self.routing_replay)
        if self.reward.scheme == "uniform" and self.likelihood.scheme == "uniform":
            raise ValueError(
                "the weighting looks at neither reward nor likelihood, so the grader changes nothing;"
                " choose `preset: grpo`, or a `reward` scheme"
            )
        if self.rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature is 0: all samples of a prompt would be the same; choose one above 0"
            )
        if self.rollout.top_p < 1 and self.uses_ratios:
            raise ValueError(
                "rollout.top_p below 1 changes the probabilities that token ratios compare; set it to 1, or drop"
                " clip, mismatch and policy_over_data"
            )
        if self.rollout.steer > 0 and not uses_likelihood(self):
            raise ValueError(
                "rollout.steer goes by weights of likelihood, and this weighting has none; set it to 0,"
                " or choose a `likelihood`"
            )
        if "round" in needs(self):
            raise ValueError(
                "an online job's samples are the current policy's own, so there is no round to freeze it for;"
                " set rounds to 1, or use a `weighted` job on the rollouts"
            )
        if self.training.batch_size != "auto":
            raise ValueError(
                "training.batch_size is given, but a batch is a round's samples; set rollout.prompts_per_round"
            )
        if self.training.replay_share > 0:
            raise ValueError("online jobs have no replay rows; set training.replay_share to 0")
        if self.guards.moving_average > 0:
            raise ValueError("guards.moving_average needs rows that come again; online samples are all new")
        if self.training.inner_steps > self.rollout.samples_per_round:
            raise ValueError(
                f"training.inner_steps is {self.training.inner_steps}, but a round has only"
                f" {self.rollout.samples_per_round} samples"
            )
        return self

    @property
    def effective_clip(self) -> Clip | None:
        """`clip` with "auto" decided."""
        if self.clip == "auto":
            return Clip() if self.training.inner_steps > 1 or self.rollout.max_staleness > 0 else None
        return self.clip

    @property
    def uses_ratios(self) -> bool:
        """Whether the sampler's log-probabilities are compared with anybody's."""
        over_data = getattr(self.likelihood, "of", None) == "policy_over_data"
        return self.effective_clip is not None or self.mismatch is not None or over_data


class ReinforcementHyperparameters(Hyperparameters):
    """OpenAI's knobs of reinforcement fine-tuning; `batch_size` counts prompts."""

    compute_multiplier: float | Auto = "auto"
    """Samples per prompt are 8 times this."""
    eval_interval: int | Auto = "auto"
    """Rounds between evaluations."""
    eval_samples: int | Auto = "auto"
    """Taken for the client's sake: evaluation scores the held-out answers and samples nothing."""
    reasoning_effort: Literal["default"] | None = None
    """Only the default: the models here have no such setting."""

    @model_validator(mode="after")
    def _range(self) -> ReinforcementHyperparameters:
        if self.compute_multiplier != "auto" and not 0.25 <= self.compute_multiplier <= 128:
            raise ValueError(
                f'compute_multiplier must be "auto" or in [0.25, 128], not {self.compute_multiplier}'
            )
        return self


class ReinforcementMethod(Strict):
    """`method.reinforcement`, OpenAI's: our online loop with the preset `grpo` and clipped ratios."""

    grader: GraderSection
    response_format: None = None
    """Not offered: answers are free text."""
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()

    def online(self) -> OnlineMethod:
        """The same as `method.online`."""
        knobs = self.hyperparameters
        multiplier = 1.0 if knobs.compute_multiplier == "auto" else knobs.compute_multiplier
        rollout: dict[str, Any] = {"samples_per_prompt": round(8 * multiplier)}
        if knobs.batch_size != "auto":
            rollout["prompts_per_round"] = knobs.batch_size
        training = {
            "epochs": knobs.n_epochs,
            "learning_rate_multiplier": knobs.learning_rate_multiplier,
            "evaluate_every": knobs.eval_interval,
        }
        return OnlineMethod.model_validate(
            {
                "preset": "grpo",
                "grader": self.grader.model_dump(),
                "rollout": rollout,
                "clip": {},
                "training": training,
            }
        )


class BestOfNMethod(Strict):
    """`method.best_of_n`: write N samples a prompt, grade them, keep the best. No training, unless `then`."""

    grader: GraderSection
    rollout: Rollout = Rollout()
    then: WeightedMethod | None = None
    """Train on all candidates with their rewards afterwards, for example `{preset: bon}`."""


class Method(Strict):
    """Which training, with the block of the same name."""

    type: Literal["supervised", "weighted", "dpo", "online", "reinforcement", "best_of_n"]
    supervised: SupervisedMethod | None = None
    weighted: WeightedMethod | None = None
    dpo: DpoMethod | None = None
    online: OnlineMethod | None = None
    reinforcement: ReinforcementMethod | None = None
    best_of_n: BestOfNMethod | None = None

    @model_validator(mode="after")
    def _one_block(self) -> Method:
        for name in METHODS:
            if name != self.type and getattr(self, name) is not None:
                raise ValueError(f"method.{name} is given but method.type is {self.type!r}; drop one of them")
        if self.type in NEED_GRADER and getattr(self, self.type) is None:
            raise ValueError(f"method.type {self.type!r} needs method.{self.type} with a grader")
        return self


METHODS = tuple(name for name in Method.model_fields if name != "type")
NEED_GRADER = ("online", "reinforcement", "best_of_n")
