"""Score a data set once with a frozen model: streaming, over any number of scorers, cached.

The data set is cut into micro-batches of similar length and these into blocks, by lengths alone.
Scorers take whole blocks, so one or four of them, on Ray or in this process, compute the same
forward passes and give the same bits; a scorer that died has its block computed again.

    N  samples of the data set      B  samples of one micro-batch
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.reference import ReferenceModel, ScoringSpec
from modeseek_ray.data.batching import pack
from modeseek_ray.errors import ModeseekError, NumericsError, WorkerError
from modeseek_ray.types import FloatArray, IntArray, Sample

MICRO_BATCHES_PER_BLOCK = 4  # a block is what a scorer takes at once and what is computed again if it dies
STALL_S = 1800.0
_FORMAT = 1  # of the cache; raise it when the same inputs give other scores
_KEY = b"modeseek_scores_key"

Progress = Callable[[int, int], None]  # samples done, samples in all
Scored = tuple[IntArray, FloatArray]  # positions in the data set, their log-probabilities

_log = logging.getLogger(__name__)


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
    """Log-probability of every sample, summed over its trained tokens, [N] nats.

    Await before trainers are placed: scorers need their CPUs. With `on_ray` this process must be
    connected to a cluster. Scores are read from `cache_dir` where the same model has scored the same
    tokens in the same way before, and written there otherwise.

    Raises `WorkerError` when it takes longer than `deadline_s`, or when no block was finished for
    `stall_s`: Ray Data waits in silence for CPUs that others hold. Raises what the scorers raise.
    """
    if not samples:
        return np.zeros(0)
    path, key = None, ""
    if cache_dir is not None:
        key = await asyncio.to_thread(cache_key, samples, spec)
        path = cache_dir / f"{key}.parquet"
        cached_N = read_scores(path, key, len(samples))
        if cached_N is not None:
            _log.info("scores of %d samples read from %s", len(samples), path)
            return cached_N
    blocks = cut(samples, spec.micro_batch_tokens)
    work = _on_ray(blocks, spec, num_scorers) if on_ray else _here(blocks, spec)
    log_prob_N = np.full(len(samples), np.nan)
    async for index_N, values_N in _stream(work, len(blocks), deadline_s, stall_s):
        log_prob_N[index_N] = values_N
        if progress is not None:
            progress(int(np.isfinite(log_prob_N).sum()), len(samples))
    if not np.isfinite(log_prob_N).all():
        raise NumericsError(
            f"{int(np.isnan(log_prob_N).sum())} of {len(samples)} samples came back without a score.",
            mend="Start the job again; if it happens twice, report it.",
        )
    if path is not None:
        write_scores(path, key, samples, log_prob_N)
    return log_prob_N


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
    """What Ray Data keeps a pool of: a reference model that turns a block's tokens into log-probabilities.

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
        for micro_batch in np.unique(micro_batch_N):
            index_B = np.flatnonzero(micro_batch_N == micro_batch)
            tokens = self._model.score_micro_batch([samples[i] for i in index_B])
            log_prob_N[index_B] = [tokens_T.sum() for tokens_T in tokens]
        return pa.table({"index": block["index"], "log_prob": log_prob_N})


# --- who computes the blocks


def _here(blocks: Sequence[pa.Table], spec: ScoringSpec) -> Iterator[Scored]:
    scorer = BlockScorer(spec)
    for block in blocks:
        yield _scored(scorer(block))


def _on_ray(blocks: Sequence[pa.Table], spec: ScoringSpec, num_scorers: int) -> Iterator[Scored]:
    """Ray Data's actor pool. It restarts scorers that died and gives their blocks to others."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # otherwise only its text comes back
    environment = {
        "OMP_NUM_THREADS": str(spec.num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve the other workers
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
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
    return block["index"].to_numpy(), block["log_prob"].to_numpy()


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


# --- the cache


def cache_key(samples: Sequence[Sample], spec: ScoringSpec) -> str:
    """Changes with anything that changes the scores: weights, tokens, masks, precision, layout, versions.

    Tokenizer, chat template and truncation act through the token ids, which are hashed themselves.
    """
    computed_by = {name: version(name) for name in ("torch", "transformers")}
    settings = {**asdict(spec), "model_path": None, "cpus_per_worker": spec.num_threads}
    settings["gpus_per_worker"] = spec.gpus_per_worker > 0
    settings["micro_batches_per_block"] = MICRO_BATCHES_PER_BLOCK
    facts = {"format": _FORMAT, "settings": settings, "versions": computed_by}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in sorted(Path(spec.model_path).iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", "model.safetensors.index.json"):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    for sample in samples:
        digest.update(np.array([sample.row, sample.length], dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(sample.token_ids_T, dtype=np.int32).tobytes())
        digest.update(np.packbits(sample.trained_T).tobytes())
    return digest.hexdigest()


def read_scores(path: Path, key: str, num_samples: int) -> FloatArray | None:
    """The cached scores; None if there are none, or if the file is damaged."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        _log.warning("the cached scores in %s cannot be read (%s); scoring again", path, error)
        return None
    if (table.schema.metadata or {}).get(_KEY) != key.encode() or table.num_rows != num_samples:
        _log.warning("the cached scores in %s are of something else; scoring again", path)
        return None
    log_prob_N: FloatArray = table["log_prob"].to_numpy()
    return log_prob_N


def write_scores(path: Path, key: str, samples: Sequence[Sample], log_prob_N: FloatArray) -> None:
    """All or nothing: written beside its final name and renamed, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "row": [s.row for s in samples],
            "num_tokens": [s.num_tokens for s in samples],
            "log_prob": log_prob_N,
        }
    ).replace_schema_metadata({_KEY: key.encode()})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
