"""`JobConfig`: all a user may ask for. The body of `POST /v1/fine_tuning/jobs` and of a job's YAML file.

Strict: an unknown field, a string where a number belongs, NaN and infinities are refused, and the
error names the path (`method.weighted.likelihood.gamma.ess.floor`). Every field says what it does
and its unit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from modeseek_ray.errors import ConfigError
from modeseek_ray.strict import Strict, error_path
from modeseek_ray.weights import Weighting

Auto = Literal["auto"]
SMALL_INT = Annotated[int, Field(ge=1, le=1_000_000)]


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
    lora: Lora | None = None
    replay_share: float = Field(0.0, ge=0, lt=1)
    """Share of each batch taken from `replay_file`."""
    evaluate_every: int | Auto = "auto"
    """Steps between evaluations; "auto" is ten times in the job. Also before the first and after the last step."""
    checkpoint_every: int | Auto = "auto"
    """Steps between checkpoints; "auto" is four times in the job, and at the end."""
    keep_checkpoints: int = Field(2, ge=2, le=100)

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

    training: Training = Training()


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


class Method(Strict):
    """Which training, with the block of the same name."""

    type: Literal["supervised", "weighted", "dpo"]
    supervised: SupervisedMethod | None = None
    weighted: WeightedMethod | None = None
    dpo: DpoMethod | None = None

    @model_validator(mode="after")
    def _one_block(self) -> Method:
        for name in ("supervised", "weighted", "dpo"):
            if name != self.type and getattr(self, name) is not None:
                raise ValueError(f"method.{name} is given but method.type is {self.type!r}; drop one of them")
        return self


class Resources(Strict):
    """What the job runs on. The defaults fit a laptop."""

    trainers: int = Field(1, ge=1, le=4096)
    """Data-parallel DeepSpeed ranks."""
    zero_stage: int = Field(2, ge=0, le=3)
    """0 replicates everything; 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    scorers: int = Field(1, ge=1, le=4096)
    """Reference actors that score the data set before training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations in training; log-softmax is always float32."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1-3; no effect on a CPU trainer)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    micro_batch_tokens: int = Field(8192, ge=1, le=100_000_000)
    """Most positions (padding included) a rank computes at once."""
    micro_batch_size: int | None = Field(None, ge=1, le=1_000_000)
    """Most samples a rank computes at once; None = as many as fit micro_batch_tokens."""
    keep_graph: Literal["auto", "always", "never"] = "auto"
    """Reuse the scoring pass's graph for the step; "auto" does where that is exact: ZeRO <= 2, or one micro-batch."""
    cpus_per_worker: float = Field(1.0, gt=0, le=1024)
    """CPU cores of each trainer and scorer; also their torch threads, rounded down, at least one."""
    gpus_per_worker: float = Field(0.0, ge=0, le=1)
    """GPUs of each trainer and scorer; a fraction shares a device. (GPU paths: see the README's table.)"""


class Integration(Strict):
    """Where metrics are sent besides the event stream."""

    type: Literal["wandb", "mlflow"]
    wandb: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None


class JobConfig(Strict):
    """One fine-tuning job.

    >>> JobConfig(model="playground/moe", training_file="a.jsonl", method=Method(type="supervised")).seed
    0
    """

    model: str = Field(min_length=1, max_length=1024)
    """A Hugging Face directory under an allowed root, `playground/moe`, or an `ft:` model."""
    training_file: str = Field(min_length=1, max_length=4096)
    """A path for `modeseek run` and `submit`; a `file-` id over HTTP."""
    validation_file: str | None = Field(None, min_length=1, max_length=4096)
    """Held-out rows of the new task: loss, and greedy accuracy where rows are graded."""
    retention_file: str | None = Field(None, min_length=1, max_length=4096)
    """What must not be forgotten: measured, never trained on."""
    replay_file: str | None = Field(None, min_length=1, max_length=4096)
    """Old rows mixed into training; see `training.replay_share`."""
    behavior_model: str | None = Field(None, min_length=1, max_length=1024)
    """The checkpoint that stands for the data distribution (mu-hat) in `policy_over_data`."""
    method: Method = Method(type="supervised")
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`, still honoured."""
    suffix: str | None = Field(None, min_length=1, max_length=64)
    """Up to 64 characters that go into the new model's name."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    metadata: dict[str, str] | None = None
    """Up to 16 pairs, keys up to 64 and values up to 512 characters."""
    resources: Resources = Resources()
    integrations: list[Integration] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> JobConfig:
        if self.metadata is not None:
            if len(self.metadata) > 16:
                raise ValueError(f"metadata has {len(self.metadata)} pairs; at most 16 are kept")
            for key, value in self.metadata.items():
                if len(key) > 64 or len(value) > 512:
                    raise ValueError(
                        f"metadata[{key[:64]!r}]: keys go up to 64 characters and values up to 512"
                    )
        training = self.training
        if training.replay_share > 0 and self.replay_file is None:
            raise ValueError(
                "training.replay_share is above 0 but there is no replay_file; name one or set it to 0"
            )
        if self.replay_file is not None and training.replay_share == 0:
            raise ValueError(
                "replay_file is given but training.replay_share is 0; set the share, for example 0.05"
            )
        return self

    @property
    def _block(self) -> SupervisedMethod | WeightedMethod | DpoMethod:
        """The chosen method's block, filled in where it was left out."""
        blocks = {"supervised": SupervisedMethod, "weighted": WeightedMethod, "dpo": DpoMethod}
        return getattr(self.method, self.method.type) or blocks[self.method.type]()

    @property
    def training(self) -> Training:
        """The training block of the chosen method, OpenAI's hyperparameters folded in."""
        block = self._block
        knobs = self.hyperparameters
        if not isinstance(block, WeightedMethod) and block.hyperparameters != type(block.hyperparameters)():
            knobs = block.hyperparameters
        names = {
            "batch_size": "batch_size",
            "learning_rate_multiplier": "learning_rate_multiplier",
            "n_epochs": "epochs",
        }
        changes = {
            ours: v for theirs, ours in names.items() if knobs and (v := getattr(knobs, theirs)) != "auto"
        }
        is_preference = self.weighting.reward.scheme == "preference"
        if is_preference and "aggregation" not in block.training.model_fields_set:
            changes["aggregation"] = "sum"
        if self.method.type == "dpo" and "batch_size" in changes:
            changes["batch_size"] *= 2  # theirs counts pairs, ours samples
        if not changes:
            return block.training
        return Training.model_validate({**block.training.model_dump(exclude_unset=True), **changes})

    @property
    def weighting(self) -> Weighting:
        """The weighting; plain SFT is the uniform one."""
        block = self._block
        if isinstance(block, WeightedMethod):
            return block
        if isinstance(block, DpoMethod):
            beta = block.hyperparameters.beta
            reward = {} if beta == "auto" else {"reward": {"beta": float(beta)}}
            return Weighting.model_validate({"preset": "dpo", **reward})
        return Weighting()


def parse_config(data: Any) -> JobConfig:
    """Validate an already parsed JSON or YAML object. Raises `ConfigError` naming the first bad path."""
    try:
        return JobConfig.model_validate(data)
    except ValidationError as error:
        raise config_error(error) from None


def read_config(path: Path) -> JobConfig:
    """Read a job from a `.yaml`, `.yml` or `.json` file. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(
            "there is no such file.", file=str(path), mend="Give the path of a job file."
        ) from None
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be parsed: {error}.", file=str(path), mend="Mend the syntax.") from None
    return parse_config(data)


def config_error(error: ValidationError, root: str = "") -> ConfigError:
    """The first problem of a pydantic error, in our shape; further ones are counted."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    path = error_path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" ({len(problems) - 1} more problems follow.)" if len(problems) > 1 else ""
    return ConfigError(f"{message}.{more}", param=f"{root}{path}" or None)
