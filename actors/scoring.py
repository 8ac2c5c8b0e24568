"""Score a data set once with a frozen model: streaming, over any number of scorers, cached.

The data set is cut into micro-batches of similar length and these into blocks, by lengths alone.
Scorers take whole blocks, so one or four of them, on Ray or in this process, compute the same
forward passes and give the same bits; a scorer that died has its block computed again.

    N  samples of the data set      B  samples of one micro-batch
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from actors.environments import scorer_environment
from actors.reference import ReferenceModel, ScoringSpec
from actors.score_cache import (
    MICRO_BATCHES_PER_BLOCK,
    Scores,
    cache_key,
    read_scores,
    routes_columns,
    routes_of,
    write_scores,
)
from modeseek_ray.data.batching import pack
from modeseek_ray.errors import ModeseekError, NumericsError, WorkerError
from modeseek_ray.routing.wire import Routes
from modeseek_ray.types import FloatArray, IntArray, Sample

STALL_S = 1800.0

Progress = Callable[[int, int], None]  # samples done, samples in all

_log = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What a block gave: positions in the data set, their log-probabilities, their routes."""

    index_N: IntArray
    log_prob_N: FloatArray
    routes_N: list[Routes] | None


async def score_dataset(
    samples: Sequence[Sample],
    spec: ScoringSpec,
    *,
    cache_dir: Path | None,
    num_scorers: int,
    on_ray: bool,
    deadline_s: float,
    stall_s: float = STALL_S,
    progress: Progress | None = None,
) -> FloatArray:
    """Log-probability of every sample, summed over its trained tokens, [N] nats. See `scores_of`."""
    scores = await scores_of(
        samples,
        spec,
        cache_dir=cache_dir,
        num_scorers=num_scorers,
        on_ray=on_ray,
        deadline_s=deadline_s,
        stall_s=stall_s,
        progress=progress,
    )
    return scores.log_prob_N


async def scores_of(
    samples: Sequence[Sample],
    spec: ScoringSpec,
    *,
    cache_dir: Path | None,
    num_scorers: int,
    on_ray: bool,
    deadline_s: float,
    stall_s: float = STALL_S,
    progress: Progress | None = None,
) -> Scores:
    """Every sample's log-probability and, with `spec.with_routes`, the experts it asks.

    Await before trainers are placed: scorers need their CPUs. With `on_ray` this process must be
    connected to a cluster. Scores are read from `cache_dir` where the same model has scored the same
    tokens in the same way before, and written there otherwise.

    Raises `WorkerError` when it takes longer than `deadline_s`, or when no block was finished for
    `stall_s`: Ray Data waits in silence for CPUs that others hold. Raises what the scorers raise.
    """
    if not samples:
        return Scores(np.zeros(0), [] if spec.with_routes else None)
    path, key = None, ""
    if cache_dir is not None:
        key = await asyncio.to_thread(cache_key, samples, spec)
        path = cache_dir / f"{key}.parquet"
        cached = read_scores(path, key, len(samples))
        if cached is not None:
            _log.info("scores of %d samples read from %s", len(samples), path)
            return cached
    blocks = cut(samples, spec.micro_batch_tokens)
    work = _on_ray(blocks, spec, num_scorers) if on_ray else _here(blocks, spec)
    log_prob_N = np.full(len(samples), np.nan)
    routes: dict[int, Routes] = {}
    async for index_N, values_N, routes_n in _stream(work, len(blocks), deadline_s, stall_s):
        log_prob_N[index_N] = values_N
        routes.update(zip(index_N.tolist(), routes_n or (), strict=routes_n is not None))
        if progress is not None:
            progress(int(np.isfinite(log_prob_N).sum()), len(samples))
    if not np.isfinite(log_prob_N).all():
        raise NumericsError(
            f"{int(np.isnan(log_prob_N).sum())} of {len(samples)} samples came back without a score.",
            mend="Start the job again; if it happens twice, report it.",
        )
    scores = Scores(log_prob_N, [routes[i] for i in range(len(samples))] if spec.with_routes else None)
    if path is not None:
        write_scores(path, key, samples, scores)
    return scores


# --- blocks


def cut(samples: Sequence[Sample], micro_batch_tokens: int) -> list[pa.Table]:
    """Blocks of a few micro-batches each, longest samples first. They depend on the samples alone."""
    micro_batches = pack(np.array([s.length for s in samples], dtype=np.int64), micro_batch_tokens)
    return [
        _table(samples, micro_batches[start : start + MICRO_BATCHES_PER_BLOCK])
        for start in range(0, len(micro_batches), MICRO_BATCHES_PER_BLOCK)
    ]


def _table(samples: Sequence[Sample], micro_batches: Sequence[IntArray]) -> pa.Table:
    index_N = np.concatenate(micro_batches)
    return pa.table(
        {
            "index": index_N,
            "micro_batch": np.repeat(np.arange(len(micro_batches)), [len(m) for m in micro_batches]),
            "row": [samples[i].row for i in index_N],
            "token_ids": pa.array([samples[i].token_ids_T for i in index_N], pa.large_list(pa.int32())),
            "trained": pa.array([samples[i].trained_T for i in index_N], pa.large_list(pa.bool_())),
        }
    )


class BlockScorer:
    """What Ray Data keeps a pool of: a reference model that turns a block's tokens into log-probabilities
    (and routes).

    The model is loaded with the first block. Ray hands back what a call raises as it was raised; what
    a constructor raises comes back as text, after three tries.
    """

    def __init__(self, spec: ScoringSpec) -> None:
        self._spec = spec
        self._model: ReferenceModel | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        if self._model is None:
            self._model = ReferenceModel(self._spec)
        samples = [
            Sample(
                row=row.as_py(),
                token_ids_T=token_ids.values.to_numpy(zero_copy_only=False),
                trained_T=trained.values.to_numpy(zero_copy_only=False),
            )
            for row, token_ids, trained in zip(
                block["row"], block["token_ids"], block["trained"], strict=True
            )
        ]
        micro_batch_N = block["micro_batch"].to_numpy()
        log_prob_N = np.empty(len(samples))
        routes_N: list[Routes] = [np.zeros(0, dtype=np.uint8)] * len(samples)
        for micro_batch in np.unique(micro_batch_N):
            index_B = np.flatnonzero(micro_batch_N == micro_batch)
            scored = self._model.score_micro_batch([samples[i] for i in index_B])
            log_prob_N[index_B] = [tokens_T.sum() for tokens_T in scored.tokens]
            for i, routes_TLK in zip(index_B, scored.routes or (), strict=scored.routes is not None):
                routes_N[i] = routes_TLK
        columns = routes_columns(routes_N) if self._spec.with_routes else {}
        return pa.table({"index": block["index"], "log_prob": log_prob_N, **columns})


# --- who computes the blocks


def _here(blocks: Sequence[pa.Table], spec: ScoringSpec) -> Iterator[Scored]:
    scorer = BlockScorer(spec)
    for block in blocks:
        yield _scored(scorer(block))


def _on_ray(blocks: Sequence[pa.Table], spec: ScoringSpec, num_scorers: int) -> Iterator[Scored]:
    environment = scorer_environment(spec.num_threads)
    if min(num_scorers, len(blocks)) == 1:
        return _by_one_actor(blocks, spec, environment)
    return _by_ray_data(blocks, spec, num_scorers, environment)


def _by_one_actor(
    blocks: Sequence[pa.Table], spec: ScoringSpec, environment: dict[str, str]
) -> Iterator[Scored]:
    """Ray starts it again if it dies, and asks it again. Ray Data would start three actors more to look after it.

    Those are left behind, too, and hold up the end of a cluster.
    """
    import ray

    scorer = (
        ray.remote(BlockScorer)
        .options(
            num_cpus=spec.cpus_per_worker,
            num_gpus=spec.gpus_per_worker,
            max_restarts=3,
            max_task_retries=3,
            runtime_env={"env_vars": environment},
        )
        .remote(spec)
    )
    try:
        coming: Any = None  # one block is on its way while another is computed
        for block in blocks:
            before, coming = coming, scorer.__call__.remote(block)
            if before is not None:
                yield _scored(ray.get(before))
        yield _scored(ray.get(coming))
    finally:
        ray.kill(scorer)


def _by_ray_data(
    blocks: Sequence[pa.Table], spec: ScoringSpec, num_scorers: int, environment: dict[str, str]
) -> Iterator[Scored]:
    """Ray Data's actor pool. It restarts scorers that died and gives their blocks to others."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # otherwise only its text comes back
    scored = ray.data.from_arrow(list(blocks)).map_batches(
        BlockScorer,
        fn_constructor_args=(spec,),
        batch_size=None,  # whole blocks: their boundaries decide the bits
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(num_scorers, len(blocks))),
        num_cpus=spec.cpus_per_worker,
        num_gpus=spec.gpus_per_worker or None,
        runtime_env={"env_vars": environment},
    )
    for block in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield _scored(block)


def _scored(block: pa.Table) -> Scored:
    routes_N = routes_of(block) if "routes" in block.column_names else None
    return Scored(block["index"].to_numpy(), block["log_prob"].to_numpy(), routes_N)


async def _stream(
    work: Iterator[Scored], num_blocks: int, deadline_s: float, stall_s: float
) -> AsyncIterator[Scored]:
    """Run blocking work in a thread and hand on what it yields; give up after `deadline_s` or a stall.

    The thread is a daemon: one that hangs inside Ray Data must not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Scored | BaseException | None] = asyncio.Queue()
    stop = threading.Event()

    def run() -> None:
        answer: BaseException | None = None
        try:
            for scored in work:
                if stop.is_set():
                    return
                loop.call_soon_threadsafe(queue.put_nowait, scored)
        except BaseException as error:
            answer = error
        if not stop.is_set():
            loop.call_soon_threadsafe(queue.put_nowait, answer)

    threading.Thread(target=run, name="scoring", daemon=True).start()
    ends = time.monotonic() + deadline_s
    done = 0
    try:
        while True:
            wait_s = min(stall_s, ends - time.monotonic())
            try:
                answer = await asyncio.wait_for(queue.get(), max(wait_s, 0))
            except TimeoutError:
                raise _too_slow(done, num_blocks, deadline_s, stall_s) from None
            if isinstance(answer, BaseException):
                raise _readable(answer) from answer
            if answer is None:
                return
            done += 1
            yield answer
    finally:
        stop.set()


def _too_slow(done: int, num_blocks: int, deadline_s: float, stall_s: float) -> WorkerError:
    return WorkerError(
        f"scoring stopped: {done} of {num_blocks} blocks were done when none was finished for {stall_s:.0f} s"
        f" or {deadline_s:.0f} s had passed.",
        mend="Other actors may hold the CPUs or GPUs (scorers wait for them): free some, or ask for fewer"
        " resources.scorers or a smaller resources.cpus_per_worker.",
        code="scoring_deadline",
    )


def _readable(error: BaseException) -> BaseException:
    """The error a scorer raised, out of the wrapper Ray puts around it."""
    cause: BaseException = getattr(error, "cause", None) or error
    if isinstance(cause, ModeseekError):
        return cause
    return WorkerError(f"scoring failed: {cause!r}", mend="The scorers' logs have the full traceback.")
