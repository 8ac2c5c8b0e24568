"""One rank of DeepSpeed: process group, ZeRO engine, gathering, saving. Knows nothing of samples.

Import this module only after `trainer.prepare_environment`: DeepSpeed reads RANK, MASTER_ADDR and
DS_ACCELERATOR when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from actors.resharding import can_reshard, reshard, shard_files
from actors.rng import derive_rng, restore_rng, rng_state
from modeseek_ray.config import Resources, Training
from modeseek_ray.errors import StorageError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_TAG = "zero"
_LAYOUT = "layout.json"


def join(rank: int, world_size: int, *, cuda: bool) -> None:
    """Join the process group of the ranks; MASTER_ADDR and MASTER_PORT say where. One per process.

    `leave` is the way out.
    """
    # Its shared-memory kernels serve inference alone, and building them needs a C++ compiler on the
    # machine and leaves a lock behind that hangs the next start if this process is killed meanwhile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Once per collective, about names inside DeepSpeed: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if torch.distributed.is_initialized():
        raise RuntimeError("this process already holds a trainer rank; close it, or start another process")
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=COLLECTIVE_TIMEOUT,
        rank=rank,
        world_size=world_size,
    )


def leave() -> None:
    """Leave the process group, so that this process may join another."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


def deepspeed_config(
    training: Training, resources: Resources, *, cuda: bool, persistence_threshold: int | None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a job.

    Micro-batches and accumulation are ours (their number varies from step to step), so DeepSpeed is
    told 1 and 1. torch's own AdamW needs no C++ or CUDA build. Parameters smaller than
    `persistence_threshold` stay whole under ZeRO-3 (None = DeepSpeed's own 1e5).

    In bfloat16, ZeRO-0 is run as ZeRO-1: the optimizer DeepSpeed would take counts one step too many,
    so that AdamW's bias correction makes the first steps a quarter too short.
    """
    bfloat16 = resources.dtype == "bfloat16"
    stage = max(1, resources.zero_stage) if bfloat16 else resources.zero_stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": cuda}
    if stage == 3 and persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = persistence_threshold
    if resources.offload_optimizer and stage > 0 and cuda:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "weight_decay": training.weight_decay,
                "torch_adam": True,
                "fused": True,  # one pass over memory instead of one for each operation
            },
        },
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if bfloat16:
        # The master copy of the weights, the moments and accumulated gradients are float32.
        # Without the overflow check a bfloat16 step would be taken on NaN gradients.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def norm_after_clipping(norm: float, limit: float) -> float:
    """The gradient norm that the optimizer gets: DeepSpeed multiplies by min(1, limit / (norm + 1e-6)).

    >>> norm_after_clipping(0.5, 1.0), round(norm_after_clipping(3.0, 1.0), 4)
    (0.5, 1.0)
    """
    return norm * min(1.0, limit / (norm + 1e-6))


def mark_leaf_modules(module: nn.Module) -> list[type[nn.Module]]:
    """Tell ZeRO-3 of blocks that hold each expert as a module of its own. Returns their classes.

    Ranks' tokens ask different experts; fetched one by one, a rank would wait for ever for others that do
    not run this expert. A leaf is fetched whole. transformers holds all experts of a layer in one stacked
    parameter, so none of its own families needs it.
    """
    classes = {
        type(block)
        for block in module.modules()
        if isinstance(getattr(block, "experts", None), nn.ModuleList)
    }
    found = sorted(classes, key=lambda c: c.__qualname__)
    if found:
        set_z3_leaf_modules(module, found)
    return found


class ZeroEngine:
    """A module under DeepSpeed ZeRO 0-3: forward, exact backward, one optimizer step, gather, save."""

    def __init__(self, module: nn.Module, config: dict[str, Any], world_size: int) -> None:
        if config["zero_optimization"]["stage"] == 3:
            mark_leaf_modules(module)
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=trainable, config=config, dist_init_required=False
        )
        self._engine.checkpoint_engine = _TensorsOnly()
        self._world_size = world_size
        self.zero_stage: int = config["zero_optimization"]["stage"]
        self.dtype = "bfloat16" if "bf16" in config else "float32"
        self.device: torch.device = self._engine.device

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    @property
    def loss_scale(self) -> float:
        """What `backward` multiplies a loss by."""
        return float(self._world_size)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; all ranks' shares add up.

        `loss` is already divided by the global denominator. DeepSpeed would average over ranks and
        accumulation steps; both are undone. All ranks call this equally often, `last` on the final one.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradients. Returns their global norm before clipping.

        A norm that is not finite comes back as it is, and then no parameter was touched. Call after
        the backward marked `last`.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        plain = isinstance(self._engine.optimizer, torch.optim.Optimizer) and not hasattr(
            self._engine.optimizer, "overflow"
        )
        if plain:  # ZeRO-0 in float32: torch's optimizer itself, gradients whole on every rank
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if math.isfinite(norm):
                self._engine.step()
            return norm
        self._engine.step()
        if self._engine.optimizer.overflow:  # DeepSpeed leaves the step out when the norm is not finite
            return math.inf
        return float(self._engine.get_global_grad_norm())

    def maximum(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self._world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return int(tensor.item())

    def total(self, value: int) -> int:
        """The sum of the ranks' values."""
        return sum(self.collect(value))

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks. Small things only."""
        if self._world_size == 1:
            return [value]
        values: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def whole(self, *parameters: nn.Parameter) -> Iterator[None]:
        """Within it these parameters are whole on every rank (ZeRO-3 keeps a part on each otherwise)."""
        if self.zero_stage < 3:
            yield
        else:
            with deepspeed.zero.GatheredParameters(list(parameters)):
                yield

    def parameters(self, module: nn.Module, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of each parameter of `module`, one at a time, on every rank.

        The tensor may be a view of the live weight and is valid until the next one is asked for.
        All ranks must run through all of it together.
        """
        for name, parameter in module.named_parameters():
            if trainable_only and not parameter.requires_grad:
                continue
            with self.whole(parameter):
                yield name, parameter.detach()

    def sha256(self, module: nn.Module) -> str:
        """Hash of names, shapes, dtypes and bits of all parameters: equal hashes mean equal weights."""
        digest = hashlib.sha256()
        for name, tensor in self.parameters(module):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write this rank's shard and RNG into `directory`. Await before the next step, which mutates them."""
        rank = torch.distributed.get_rank()
        self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        (directory / f"rng-{rank}.json").write_text(json.dumps(rng_state()), encoding="utf-8")
        if rank == 0:
            (directory / _LAYOUT).write_text(json.dumps(self._layout()), encoding="utf-8")

    def load(self, directory: Path) -> str | None:
        """Continue bit for bit where `save` was called. Raises `StorageError` for another layout.

        Another number of ranks is possible below ZeRO-3: the weights and the optimizer are the same, what
        follows is not, bit for bit. Returns a sentence that says so.
        """
        saved = json.loads((directory / _LAYOUT).read_text(encoding="utf-8"))
        moved = saved["ranks"] != self._world_size
        partitioned = self.zero_stage > 0
        if saved != {**self._layout(), "ranks": saved["ranks"]} or (
            moved and partitioned and not can_reshard(self._engine.optimizer)
        ):
            raise StorageError(
                f"the checkpoint was written with {saved}, this job runs with {self._layout()}.",
                file=str(directory),
                mend="Resume with the same resources.trainers, zero_stage and dtype; below ZeRO-3 the number of "
                "trainers may change (in bfloat16 only with ZeRO-2).",
            )
        resharded = moved and partitioned
        path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG, load_module_only=resharded)
        if path is None:
            raise StorageError("DeepSpeed could not load the checkpoint.", file=str(directory))
        rank = torch.distributed.get_rank()
        if resharded:
            files = shard_files(directory / _TAG, saved["ranks"])
            shards = [self._engine.checkpoint_engine.load(str(f), "cpu")[OPTIMIZER_STATE_DICT] for f in files]
            reshard(shards, self._engine.optimizer, rank, self._world_size)
        if rank < saved["ranks"]:
            restore_rng(json.loads((directory / f"rng-{rank}.json").read_text(encoding="utf-8")))
        else:
            derive_rng((directory / "rng-0.json").read_text(encoding="utf-8"), rank)
        return _inexact(saved["ranks"], self._world_size) if moved else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Free the engine and leave the process group."""
        self._engine.destroy()
        self.barrier()
        leave()

    def _layout(self) -> dict[str, Any]:
        return {"ranks": self._world_size, "zero_stage": self.zero_stage, "dtype": self.dtype}


def _inexact(before: int, now: int) -> str:
    return (
        f"Resumed inexactly: {before} ranks -> {now}. Weights and optimizer are those of the checkpoint; from here "
        "on gradients are summed in another order, so that the bits differ from a run in one go."
    )


class _TensorsOnly(TorchCheckpointEngine):
    """Loads tensors and plain containers only: a checkpoint somebody else wrote must not run code here.

    DeepSpeed's own engine unpickles whatever it finds. The few DeepSpeed classes its checkpoints
    hold are allowed by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True

    def save(self, state_dict: Any, path: str) -> None:
        """Raises the `OSError` itself: of a full disk torch says only that a position is unexpected."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_allowed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)


def _allowed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
