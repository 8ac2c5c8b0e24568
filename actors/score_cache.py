"""Scores of a data set on disk, by what they are scores of: a Parquet file per data set and frozen model.

N  samples of the data set      T  tokens of one sample      L, K  routers, experts per token
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.reference import ScoringSpec
from modeseek_ray.routing.wire import Routes
from modeseek_ray.types import FloatArray, Sample

MICRO_BATCHES_PER_BLOCK = 4  # a block is what a scorer takes at once and what is computed again if it dies
_FORMAT = 1  # of the cache; raise it when the same inputs give other scores
_KEY = b"modeseek_scores_key"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """A data set under a frozen model."""

    log_prob_N: FloatArray  # summed over trained tokens, nats
    routes_N: list[Routes] | None = None  # `[T - 1, L, K]` each, where they were asked for


def routes_columns(routes_N: Sequence[Routes]) -> dict[str, pa.Array]:
    """Routes as columns of a table."""
    return {
        "routes": pa.array([np.ascontiguousarray(r).tobytes() for r in routes_N], pa.large_binary()),
        "routes_shape": pa.array([list(r.shape) for r in routes_N], pa.list_(pa.int64())),
        "routes_dtype": pa.array([str(r.dtype) for r in routes_N], pa.string()),
    }


def routes_of(table: pa.Table) -> list[Routes]:
    """The inverse of `routes_columns`."""
    columns = (table[name].to_pylist() for name in ("routes", "routes_shape", "routes_dtype"))
    return [np.frombuffer(b, dtype=d).reshape(s) for b, s, d in zip(*columns, strict=True)]


def cache_key(samples: Sequence[Sample], spec: ScoringSpec) -> str:
    """Changes with anything that changes the scores: weights, tokens, masks, precision, layout, versions.

    Tokenizer, chat template and truncation act through the token ids, which are hashed themselves.
    """
    computed_by = {name: version(name) for name in ("torch", "transformers")}
    settings = {**asdict(spec), "model_path": None, "cpus_per_worker": spec.num_threads}
    settings["gpus_per_worker"] = spec.gpus_per_worker > 0
    settings["micro_batches_per_block"] = MICRO_BATCHES_PER_BLOCK
    if not spec.with_routes:  # the same scores, in files that were written before there were routes
        del settings["with_routes"]
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


def read_scores(path: Path, key: str, num_samples: int) -> Scores | None:
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
    routes_N = routes_of(table) if "routes" in table.column_names else None
    return Scores(table["log_prob"].to_numpy(), routes_N)


def write_scores(path: Path, key: str, samples: Sequence[Sample], scores: Scores) -> None:
    """All or nothing: written beside its final name and renamed, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "row": [s.row for s in samples],
            "num_tokens": [s.num_tokens for s in samples],
            "log_prob": scores.log_prob_N,
            **({} if scores.routes_N is None else routes_columns(scores.routes_N)),
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
