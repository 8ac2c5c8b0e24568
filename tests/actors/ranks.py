"""Two processes that play trainer ranks, kept for all tests: importing DeepSpeed takes seconds.

What runs inside them is here, too, because they import it by name.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np

from actors.network import free_port
from actors.pools import TrainerPool
from actors.trainer import TrainerRank, TrainerSpec
from modeseek_ray.data.batching import deal
from modeseek_ray.types import FloatArray, IntArray, Sample, StepPlan


class Ranks:
    """The processes. `start` begins a trainer of one or two ranks; `call` is a method on each of them."""

    def __init__(self, count: int = 2) -> None:
        # torch, transformers and DeepSpeed are imported once, in the server both are forked from.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["actors.policy", "tests.actors.ranks"])
        self._count = count
        self._fork()

    def start(
        self, spec: TrainerSpec, world_size: int = 1, before: Callable[..., None] | None = None
    ) -> Trainer:
        """A new trainer on the first `world_size` processes; the last one there must be closed.

        `before(rank)` is done inside them before the model is loaded.
        """
        if self._stuck():
            self.stop()
            self._fork()
        trainer = Trainer(self._pipes[:world_size], spec.resources.sequence_parallel)
        port = free_port()
        trainer.ask([(_build, (spec, rank, world_size, port)) for rank in range(world_size)])
        if before is not None:
            trainer.inside(before)
        trainer.info = trainer.each("setup")[0]
        return trainer

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _fork(self) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(self._count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stuck(self) -> bool:
        """Whether a process cannot begin anew: the others failed and left it in a collective."""
        for pipe in self._pipes:
            pipe.send((_is_free, ()))
        return not all(pipe.poll(timeout=20) and pipe.recv() == (False, True) for pipe in self._pipes)


class Trainer:
    """What `actors.pools.TrainerPool` does, in a few lines and without asyncio."""

    info: dict[str, Any]

    def __init__(self, pipes: Sequence[Connection], ranks_per_group: int = 1) -> None:
        self._pipes = pipes
        self._ranks_per_group = ranks_per_group

    def ask(self, requests: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        for pipe, request in zip(self._pipes, requests, strict=True):
            pipe.send(request)
        answers: dict[Connection, Any] = {}
        while len(answers) < len(self._pipes):
            for pipe in cast("list[Connection]", wait([p for p in self._pipes if p not in answers])):
                failed, answers[pipe] = pipe.recv()
                if failed:
                    self._take_other_answers(answers)
                    raise answers[pipe]
        return [answers[pipe] for pipe in self._pipes]

    def _take_other_answers(self, answers: dict[Connection, Any]) -> None:
        """Or they would be taken for those of the next call. A rank left alone in a collective has none."""
        for pipe in self._pipes:
            if pipe not in answers and pipe.poll(timeout=20):
                pipe.recv()

    def each(self, method: str, *args: Any) -> list[Any]:
        """The same call on every rank."""
        return self.ask([(_call, (method, *args))] * len(self._pipes))

    def inside(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` inside every rank."""
        return self.ask([(function, args)] * len(self._pipes))

    def split(self, samples: Sequence[Sample]) -> list[IntArray]:
        return deal(np.array([s.length for s in samples]), len(self._pipes) // self._ranks_per_group)

    def of_groups(self, requests: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        """One request a group of ranks that share their samples; the answers of the first rank of each."""
        every = [request for request in requests for _ in range(self._ranks_per_group)]
        return self.ask(every)[:: self._ranks_per_group]

    def per_sample(self, method: str, samples: Sequence[Sample], *args: Any) -> list[tuple[IntArray, Any]]:
        """A call on samples dealt out to the ranks: the indices each got, and what it answered."""
        shares = self.split(samples)
        requests = [(_call, (method, [(0, int(i)) for i in share], *args, list(samples))) for share in shares]
        return list(zip(shares, self.of_groups(requests), strict=True))

    def score(self, samples: Sequence[Sample], method: str = "score") -> FloatArray:
        log_prob_N = np.empty(len(samples))
        for share, part in self.per_sample(method, samples):
            log_prob_N[share] = part
        return log_prob_N

    def step(self, samples: Sequence[Sample], plan: StepPlan) -> list[Any]:
        """The ranks' reports."""
        requests = []
        for share in self.split(samples):
            own = StepPlan(**{**vars(plan), "values_N": plan.values_N[share]})
            requests.append((_call, ("step", [(0, int(i)) for i in share], own, list(samples))))
        return self.of_groups(requests)

    def loss(self, samples: Sequence[Sample], plan: StepPlan) -> float:
        return sum(report.loss for report in self.step(samples, plan))

    def pool(self) -> TrainerPool:
        """The real pool over these ranks, for what only it does: `begin`, then steps on parts of the batch."""
        return TrainerPool([PipeWorker(pipe) for pipe in self._pipes], deal, self._ranks_per_group)

    def sha256(self) -> str:
        hashes = set(self.each("weights_sha256"))
        assert len(hashes) == 1, "ranks disagree about the weights"
        return hashes.pop()

    def close(self) -> None:
        """Close every rank that still answers; `Ranks.start` replaces the others."""
        for pipe in self._pipes:
            pipe.send((_call, ("close",)))
        for pipe in self._pipes:
            if pipe.poll(timeout=20):
                pipe.recv()


class PipeWorker:
    """A rank's process as `actors.pools` sees a worker."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    async def call(self, method: str, *args: Any) -> Any:
        failed, answer = await asyncio.to_thread(self._ask, method, args)
        if failed:
            raise answer
        return answer

    async def stop(self) -> None:
        """The process is `Ranks`' to stop."""

    def _ask(self, method: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
        self._pipe.send((_call, (method, *args)))
        answer: tuple[bool, Any] = self._pipe.recv()
        return answer


Start = Callable[..., Trainer]


def plan_for(
    samples: Sequence[Sample],
    values_N: np.ndarray | None = None,
    *,
    step: int = 0,
    rate: float = 1e-3,
    **more: Any,
) -> StepPlan:
    num_tokens = sum(s.num_tokens for s in samples)
    values = np.ones(len(samples)) if values_N is None else values_N
    return StepPlan(step=step, values_N=values, denominator=float(num_tokens), learning_rate=rate, **more)


def with_config(model: Path, copy: Path, **changes: Any) -> Path:
    """A copy of a model directory whose config.json says something else."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def relative_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Norm of the difference over norm, all parameters as one vector."""
    assert first.keys() == second.keys()
    off = sum(float(((first[n] - second[n]) ** 2).sum()) for n in first)
    size = sum(float((first[n] ** 2).sum()) for n in first)
    return float(np.sqrt(off / size))


# --- inside the processes

_rank: TrainerRank | None = None
_projections = 0
_returns = 0


def _serve(pipe: Connection) -> None:
    while (request := pipe.recv()) is not None:
        function, args = request
        try:
            target = () if function is _build else (_rank,)
            pipe.send((False, function(*target, *args)))
        except Exception as error:  # the test raises it
            pipe.send((True, error))


def _is_free(rank: TrainerRank | None) -> bool:
    import torch

    return not torch.distributed.is_initialized()


def _build(spec: TrainerSpec, rank: int, world_size: int, port: int) -> None:
    global _rank
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    # ZeRO-3 numbers modules and parameters within a process and compares the numbers between ranks:
    # these processes have different pasts, a job's do not.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)
    _rank = TrainerRank(spec, rank, world_size, "127.0.0.1", port)


def _call(rank: TrainerRank, method: str, *args: Any) -> Any:
    return getattr(rank, method)(*args)


def capture_gradients(rank: TrainerRank) -> None:
    """From now on the gradient of each step is kept, as it is right before the optimizer reads it."""
    from deepspeed.utils import safe_get_full_grad

    policy = rank._ready()
    engine = policy.engine
    take = engine.step

    def gradient(parameter: Any) -> Any:
        return parameter.grad if engine.zero_stage == 0 else safe_get_full_grad(parameter)

    def step(learning_rate: float) -> float:
        policy.captured = {  # type: ignore[attr-defined]
            name: gradient(parameter).detach().double().numpy().copy()
            for name, parameter in policy._module.model.named_parameters()
            if parameter.requires_grad
        }
        return take(learning_rate)

    engine.step = step  # type: ignore[method-assign]


def captured_gradients(rank: TrainerRank) -> dict[str, np.ndarray]:
    captured: dict[str, np.ndarray] = rank._ready().captured  # type: ignore[attr-defined]
    return captured


def count_projections(_: TrainerRank, kept_bytes: int) -> None:
    """From now on chunks of logits that are computed are counted; so much of them a forward pass may keep."""
    from modeseek_ray.objectives import head

    global _projections
    _projections = 0
    head.KEPT_BYTES = kept_bytes
    if head.Logits.__call__.__name__ == "counting":
        return
    compute = head.Logits.__call__

    def counting(self: Any, part: slice) -> Any:
        global _projections
        _projections += 1
        return compute(self, part)

    head.Logits.__call__ = counting  # type: ignore[method-assign]


def watch_returned_memory(_: TrainerRank, least_bytes: int) -> None:
    """From now on embeddings of so many bytes are large, and what would return memory is counted."""
    from actors import allocator

    global _returns
    _returns = 0
    allocator.LARGE_EMBEDDINGS_BYTES = least_bytes

    def counting() -> None:
        global _returns
        _returns += 1

    allocator.return_freed_memory = counting


def returns(_: TrainerRank) -> int:
    return _returns


def projections(_: TrainerRank) -> int:
    return _projections


def parameters(rank: TrainerRank) -> dict[str, np.ndarray]:
    policy = rank._ready()
    return {
        name: tensor.float().numpy().copy() for name, tensor in policy.engine.parameters(policy._module.model)
    }


def live_routes(rank: TrainerRank, samples: Sequence[Sample]) -> list[np.ndarray]:
    """The experts each sample's positions ask now, wire form, one sample at a time. One rank."""
    from actors.forward import Routing

    passes = rank._ready()._passes
    found = [next(iter(passes.infer([s], routing=Routing(record=True)))) for s in samples]
    return [forward.routes_of(0, s.length) for forward, s in zip(found, samples, strict=True)]  # type: ignore[misc]


def token_log_probs(rank: TrainerRank, samples: Sequence[Sample]) -> list[np.ndarray]:
    """As the rank scores them, in one micro-batch: [length] each, 0 where not trained."""
    policy = rank._ready()
    forward = next(iter(policy._step_passes.scoring(samples)))
    columns = forward.scores.log_prob_M.detach().split(forward.batch.num_tokens_B.tolist())
    found = [np.zeros(s.length, dtype=np.float32) for s in samples]
    for i, column in zip(forward.index_B, columns, strict=True):
        found[i][samples[i].trained_T] = column.numpy()
    return found


def pasts_of(_: TrainerRank, samples: Sequence[Sample], log_probs: Sequence[float]) -> list[float]:
    """Keep each sample with one log-probability for all its tokens, one micro-batch each; what is found again."""
    import torch

    from actors.begun import Begun
    from actors.forward import Forward
    from modeseek_ray.objectives.collate import collate
    from modeseek_ray.objectives.logprobs import TokenScores

    begun = Begun()
    for i, log_prob in enumerate(log_probs):
        batch = collate(samples, [i], pad_id=0)
        log_prob_M = torch.full(batch.target_M.shape, log_prob)
        scores = TokenScores(log_prob_M, torch.ones_like(log_prob_M, dtype=torch.bool))
        begun.keep(samples, Forward(np.array([i]), batch, scores))
    pasts = begun.of(samples)
    assert pasts is not None
    return [float(past.log_prob_T.mean()) for past in pasts]


def partition_status(rank: TrainerRank) -> list[str]:
    """ZeRO-3's word on every parameter: NOT_AVAILABLE where this process holds a part only."""
    parameters: Any = rank._ready()._module.parameters()
    return [p.ds_status.name for p in parameters]


def rotary_frequencies(rank: TrainerRank) -> np.ndarray:
    frequencies: np.ndarray = rank._ready()._module.backbone.rotary_emb.inv_freq.double().numpy()  # type: ignore[operator, union-attr]
    return frequencies


def recomputes(rank: TrainerRank) -> bool:
    """Whether gradient checkpointing is on."""
    return bool(rank._ready()._module.model.is_gradient_checkpointing)


def poison(rank: TrainerRank, token_id: int) -> None:
    """Put a NaN into a token's embedding."""
    import torch

    backbone: Any = rank._ready()._module.backbone
    backbone.get_input_embeddings().weight.data[token_id, 0] = torch.nan


def draws(rank: TrainerRank) -> tuple[float, float, float]:
    """One number from each random generator."""
    import random

    import torch

    return float(torch.rand(())), float(np.random.random()), random.random()


def capture_norms(rank: TrainerRank) -> None:
    """From now on: the squared norm of the gradients this rank's optimizer is handed, after clipping."""
    policy = rank._ready()
    optimizer: Any = policy.engine._engine.optimizer
    while hasattr(optimizer, "optimizer"):  # DeepSpeed's around torch's
        optimizer = optimizer.optimizer
    take = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        square = sum(float((g.double() ** 2).sum()) for g in gradients)
        policy.square = getattr(policy, "square", 0.0) + square  # type: ignore[attr-defined]
        return take(*args, **kwargs)

    def begin(learning_rate: float) -> float:
        policy.square = 0.0  # type: ignore[attr-defined]
        return whole(learning_rate)

    whole = policy.engine.step
    policy.engine.step = begin  # type: ignore[method-assign]
    optimizer.step = step


def captured_square(rank: TrainerRank) -> float:
    """Of the last step."""
    square: float = rank._ready().square  # type: ignore[attr-defined]
    return square


def nudge_routers(rank: TrainerRank, scale: float) -> None:
    """Add noise to the weights of every router, relative to their deviation. ZeRO-2 and below."""
    import torch

    from modeseek_ray.routing.describe import find_routers

    torch.manual_seed(1)
    for router in find_routers(rank._ready()._module):
        weight = router.module.weight.data
        weight.add_(torch.randn_like(weight) * weight.std() * scale)  # type: ignore[operator, arg-type]


def num_micro_batches(rank: TrainerRank, samples: Sequence[Sample]) -> int:
    """Into how many a rank's samples are cut."""
    return len(rank._ready()._passes.cut(samples))


def positions_seen(rank: TrainerRank, samples: Sequence[Sample]) -> dict[str, int]:
    """Positions through the first layer's MLP and through the head in one training pass, and what autograd keeps."""
    import torch

    policy = rank._ready()
    backbone: Any = policy._module.backbone
    seen: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            seen[name] = args[0].flatten(0, -2).shape[0]

        return hook

    kept: dict[int, int] = {}  # by storage: views count once, and parameters do not

    def keep(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in policy._module.parameters()}
    hooks = [
        backbone.layers[0].mlp.register_forward_hook(count("mlp")),
        policy._module.head.register_forward_hook(count("head")),
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        [forward] = list(policy._passes.train(samples, policy._passes.cut(samples)))
    for hook in hooks:
        hook.remove()
    policy.engine.backward(forward.scores.log_prob_M.double().sum(), last=True)
    return {**seen, "saved_bytes": sum(kept.values())}


def shift_positions(rank: TrainerRank) -> None:
    """The next model that is loaded here adds to each position's embedding that of the one before it."""
    from actors import modeling

    load = modeling.load_causal_lm

    def shifted(*args: Any) -> Any:
        modeling.load_causal_lm = load
        model = load(*args)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            return output + output.roll(1, dims=1)

        model.get_input_embeddings().register_forward_hook(hook)
        return model

    modeling.load_causal_lm = shifted
