"""`JobConfig`: all a user may ask for. The body of `POST /v1/fine_tuning/jobs` and of a job's YAML file.

Strict: an unknown field, a string where a number belongs, NaN and infinities are refused, and the
error names the path (`method.weighted.likelihood.gamma.ess.floor`). Every field says what it does
and its unit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from modeseek_ray.errors import ConfigError
from modeseek_ray.mends import mend_for
from modeseek_ray.methods import (
    BestOfNMethod,
    DpoHyperparameters,
    DpoMethod,
    Hyperparameters,
    Lora,
    Method,
    OnlineMethod,
    ReinforcementMethod,
    Rollout,
    SupervisedMethod,
    Training,
    WeightedMethod,
)
from modeseek_ray.strict import Strict, error_path
from modeseek_ray.weights import Weighting

__all__ = [
    "BestOfNMethod",
    "DpoHyperparameters",
    "DpoMethod",
    "Hyperparameters",
    "Integration",
    "JobConfig",
    "Lora",
    "Method",
    "OnlineMethod",
    "ReinforcementMethod",
    "Resources",
    "Rollout",
    "SupervisedMethod",
    "Training",
    "WeightedMethod",
    "config_error",
    "parse_config",
    "read_config",
    "rooted",
]


class Resources(Strict):
    """What the job runs on. The defaults fit a laptop."""

    trainers: int = Field(1, ge=1, le=4096)
    """DeepSpeed ranks, data-parallel but for `sequence_parallel`."""
    sequence_parallel: int = Field(1, ge=1, le=64)
    """Neighbouring trainers that share their samples, each with a part of every sequence (Ulysses): for samples too
    long for one. A divisor of `trainers` and of the model's attention heads. Scorers hold whole samples."""
    zero_stage: int = Field(2, ge=0, le=3)
    """0 replicates everything; 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    scorers: int = Field(1, ge=1, le=4096)
    """Reference actors that score the data set before training, or online samples as they come."""
    generators: int = Field(1, ge=1, le=4096)
    """vLLM engines that write the samples of an online job."""
    generator_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the engines' weights and activations; "auto" is the trainers'."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """GPUs an engine is spread over."""
    expert_parallel: bool = False
    """MoE: deal whole experts out over an engine's tensor-parallel GPUs instead of cutting each."""
    colocated: bool = False
    """Put each engine on a trainer's GPU instead of one of its own: it sleeps, its weights in host memory, while
    the trainer works. Both then take fractions of the GPU (gpus_per_worker: 0.5)."""
    weight_transfer: Literal["object_store", "nccl", "ipc"] = "object_store"
    """How an online job's new weights reach the engines: through host memory (object_store), which works everywhere
    and brings a restarted engine along; from GPU to GPU (nccl), for which every trainer and engine needs GPUs of
    its own; or within the GPU that a trainer and an engine share (ipc), which needs `colocated`. With nccl and ipc
    an engine that dies costs the attempt."""
    kv_cache_gib: float = Field(1.0, gt=0, le=1024)
    """Host memory an engine on the CPU keeps for keys and values."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations in training; log-softmax is always float32."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1-3; no effect on a CPU trainer)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    micro_batch_tokens: int = Field(8192, ge=1, le=100_000_000)
    """Most positions (padding included) a rank computes at once; of a shared sequence, its own part."""
    micro_batch_size: int | None = Field(None, ge=1, le=1_000_000)
    """Most samples a rank computes at once; None = as many as fit micro_batch_tokens."""
    keep_graph: Literal["auto", "always", "never"] = "auto"
    """Reuse the scoring pass's graph for the step; "auto" does where that is exact: ZeRO <= 2, or one micro-batch."""
    placement: Literal["pack", "spread"] = "pack"
    """Over the nodes of the cluster: workers on as few as possible, or on as many. Scorers of a data set, which
    say nothing to each other, are always spread."""
    cpus_per_worker: float = Field(1.0, gt=0, le=1024)
    """CPU cores of each trainer and scorer; also their torch threads, rounded down, at least one."""
    gpus_per_worker: float = Field(0.0, ge=0, le=1)
    """GPUs of each trainer and scorer; a fraction shares a device. (GPU paths: see the README's table.)"""

    @property
    def trainer_groups(self) -> int:
        """Trainers that hold different samples."""
        return self.trainers // self.sequence_parallel

    def check_heads(self, num_heads: int) -> None:
        """Raise `ConfigError` where a model's attention heads cannot be dealt over those who share a sequence."""
        if num_heads % self.sequence_parallel:
            raise ConfigError(
                f"{num_heads} attention heads do not divide by sequence_parallel {self.sequence_parallel}.",
                param="resources.sequence_parallel",
                mend="Set it to a divisor of the model's heads, or to 1.",
            )

    @model_validator(mode="after")
    def _fit(self) -> Resources:
        if self.trainers % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} makes groups of so many trainers; set trainers to a"
                f" multiple of it, not to {self.trainers}"
            )
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "expert_parallel deals experts out over tensor_parallel GPUs; set that above 1, or drop it"
            )
        if self.tensor_parallel > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs whole GPUs; set gpus_per_worker to 1"
            )
        if self.weight_transfer == "nccl" and not self._apart:
            why = (
                "colocated puts a trainer and an engine on one GPU, which cannot be in one communicator twice"
                if self.colocated
                else f"gpus_per_worker {self.gpus_per_worker:g} gives no worker a GPU of its own"
            )
            raise ValueError(
                f"weight_transfer nccl goes from GPU to GPU, and {why}; set gpus_per_worker to 1 without"
                " colocated, or weight_transfer to object_store"
            )
        if self.weight_transfer == "ipc" and not (self.colocated and self.gpus_per_worker):
            why = (
                f"gpus_per_worker {self.gpus_per_worker:g} gives no worker one"
                if self.colocated
                else "without colocated every engine is on another one"
            )
            raise ValueError(
                f"weight_transfer ipc stays within the GPU that a trainer and an engine share, and {why}; set"
                " colocated to true and gpus_per_worker to 0.5, or weight_transfer to object_store"
            )
        if self.gpus_per_worker and self._may_meet:
            raise ValueError(
                f"two trainers with {self.gpus_per_worker:g} of a GPU may be put on the same one, which cannot be in"
                " one NCCL communicator twice; set gpus_per_worker above 0.5 (with colocated to 0.5), or trainers to 1"
            )
        if self.colocated:
            if self.generators > self.trainers:
                raise ValueError(
                    f"colocated puts each engine beside a trainer: {self.generators} generators need as"
                    f" many trainers, not {self.trainers}"
                )
            if self.gpus_per_worker > 0.5:
                raise ValueError(
                    f"colocated shares a GPU between a trainer and an engine; gpus_per_worker is"
                    f" {self.gpus_per_worker:g}, set it to 0.5 or less"
                )
        return self

    @property
    def _may_meet(self) -> bool:
        """Whether the places of two trainers, engines beside them included, fit on one GPU."""
        engines = self.generators if self.colocated else 0
        shares = sorted(self.gpus_per_worker * (2 if i < engines else 1) for i in range(self.trainers))
        return self.trainers > 1 and sum(shares[:2]) <= 1

    @property
    def _apart(self) -> bool:
        """Whether no two workers share a GPU."""
        return self.gpus_per_worker == 1 and not self.colocated


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
        if self.resources.colocated and self.rollout and self.rollout.max_staleness > 0:
            raise ValueError(
                "resources.colocated lets an engine sleep while the trainer works, and"
                " rollout.max_staleness lets them work at once; drop the one, or set the other to 0"
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
    def online(self) -> OnlineMethod | None:
        """The online loop's settings; OpenAI's `reinforcement` is one."""
        method = self.method
        return method.reinforcement.online() if method.reinforcement is not None else method.online

    @property
    def best_of_n(self) -> BestOfNMethod | None:
        return self.method.best_of_n

    @property
    def rollout(self) -> Rollout | None:
        """How samples are written, where the job writes any: its training file is then one of prompts."""
        writes = self.online or self.best_of_n
        return None if writes is None else writes.rollout

    @property
    def grader(self) -> Any:
        """The section of the grader, or None."""
        writes = self.online or self.best_of_n
        return None if writes is None else writes.grader

    @property
    def routing_replay(self) -> Literal["R0", "R2", "R3"] | None:
        """Whose experts an MoE policy's passes ask; None = live."""
        block = self._block
        return block.routing_replay if isinstance(block, WeightedMethod | OnlineMethod) else None

    @property
    def _block(self) -> SupervisedMethod | WeightedMethod | DpoMethod | OnlineMethod:
        """The chosen method's block, filled in where it was left out."""
        if self.online is not None:
            return self.online
        if self.best_of_n is not None:
            return self.best_of_n.then or WeightedMethod()
        blocks = {"supervised": SupervisedMethod, "weighted": WeightedMethod, "dpo": DpoMethod}
        return getattr(self.method, self.method.type) or blocks[self.method.type]()

    @property
    def training(self) -> Training:
        """The training block of the chosen method, OpenAI's hyperparameters folded in."""
        block = self._block
        knobs = self.hyperparameters
        if isinstance(block, SupervisedMethod | DpoMethod):
            own = block.hyperparameters
            knobs = knobs if own == type(own)() else own
        names = {
            "batch_size": "batch_size",
            "learning_rate_multiplier": "learning_rate_multiplier",
            "n_epochs": "epochs",
        }
        changes: dict[str, Any] = {
            ours: v for theirs, ours in names.items() if knobs and (v := getattr(knobs, theirs)) != "auto"
        }
        is_preference = self.weighting.reward.scheme == "preference"
        if is_preference and "aggregation" not in block.training.model_fields_set:
            changes["aggregation"] = "sum"
        if self.method.type == "dpo" and "batch_size" in changes:
            changes["batch_size"] *= 2  # theirs counts pairs, ours samples
        if self.online is not None:
            changes["batch_size"] = self.online.rollout.samples_per_round
        if not changes:
            return block.training
        return Training.model_validate({**block.training.model_dump(exclude_unset=True), **changes})

    @property
    def weighting(self) -> Weighting:
        """The weighting; plain SFT is the uniform one."""
        block = self._block
        if isinstance(block, WeightedMethod | OnlineMethod):
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
        raise config_error(error, model=JobConfig) from None


def rooted(param: str, method_type: str) -> str:
    """A path as the user of that method has it: checks of a weighting say `method.weighted`.

    >>> rooted("method.weighted.likelihood.of", "online")
    'method.online.likelihood.of'
    """
    return param.replace("method.weighted", f"method.{method_type}", 1)


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


def config_error(error: ValidationError, root: str = "", model: type[BaseModel] | None = None) -> ConfigError:
    """The first problem of a pydantic error, in our shape, with a way out; further ones are counted.

    With the `model` that was validated, a misspelt field is told its nearest name.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    mend = mend_for(first, model)
    path = error_path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field"
    elif first["type"] == "literal_error":  # what it may be is the mend
        message = f"{str(first['input'])[:60]!r} is not one of its choices"
    elif first["type"] == "value_error":
        message = message.rpartition("; ")[0] or message
    elif first["type"] in ("unknown_scheme", "unknown_type"):  # the field that tells sections apart
        path = ".".join(filter(None, (path, first["type"].removeprefix("unknown_"))))
    more = f" ({len(problems) - 1} more problems follow.)" if len(problems) > 1 else ""
    return ConfigError(f"{message}.{more}", mend=mend, param=f"{root}{path}" or None)
