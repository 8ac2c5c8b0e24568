"""What the generator wrote, graded, on disk before it is trained on: one Parquet file a round.

A resumed attempt reads the rounds an earlier one left instead of writing them again, so the final
weights are a function of the configuration and these files. `gathered` puts all rounds into one
file whose rows another job can train on as they are (`token_ids`, `prompt_tokens`): reweigh without
generating again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from modeseek_ray.errors import cannot_write
from modeseek_ray.jobs.paths import sync_directory
from modeseek_ray.rewards import Grade
from modeseek_ray.types import Completion, Prompt

_PREFIX = "round-"
_SCHEMA = pa.schema(
    [
        ("round", pa.int64()),
        ("prompt", pa.int64()),  # ordinal in the prompt file
        ("sample", pa.int64()),  # which of the N
        ("token_ids", pa.list_(pa.int32())),  # prompt and completion
        ("prompt_tokens", pa.int64()),
        ("logprobs", pa.list_(pa.float32())),  # of the completion's tokens, as they were drawn
        ("text", pa.string()),
        ("reward", pa.float64()),
        ("error", pa.string()),  # why there is no reward
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("seed", pa.uint64()),
        ("routes", pa.binary()),
        ("routes_shape", pa.list_(pa.int64())),
        ("routes_dtype", pa.string()),
    ]
)
# What a later job may be given: everything but routes, which are of the model as it was.
_SHARED = ("token_ids", "prompt_tokens", "logprobs", "reward", "text", "error", "weight_version")


@dataclass(frozen=True)
class Rollout:
    """One graded sample."""

    prompt: Prompt
    sample: int  # which of the N
    completion: Completion
    text: str
    grade: Grade

    @property
    def token_ids_T(self) -> NDArray[np.int32]:
        """Prompt and completion in one sequence."""
        return np.concatenate([self.prompt.token_ids_T, self.completion.token_ids_T]).astype(np.int32)


def by_prompt(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Samples of one question together, in order of first appearance."""
    found: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt.ordinal, []).append(rollout)
    return list(found.values())


class RolloutStore:
    """The rounds of one job under `directory`. One writer: the driver of the newest attempt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, round_: int, rollouts: Sequence[Rollout]) -> None:
        """All or nothing, and on the disk on return: written aside, flushed, renamed. Raises `StorageError`."""
        table = pa.Table.from_pylist([_row(round_, r) for r in rollouts], schema=_SCHEMA)
        path = self._path(round_)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            if not self._directory.is_dir():
                self._directory.mkdir(parents=True, exist_ok=True)
                sync_directory(self._directory.parent)
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(self._directory)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cannot_write(
                f"rollouts of round {round_}", path, error, kept="earlier rounds are"
            ) from error

    def read(self, round_: int, prompts: Sequence[Prompt]) -> list[Rollout] | None:
        """The round as it was written; None if it was not. `prompts` are those of the job's file, by ordinal."""
        by_ordinal = {prompt.ordinal: prompt for prompt in prompts}
        try:
            rows = pq.read_table(self._path(round_), schema=_SCHEMA).to_pylist()
            return [_rollout(row, by_ordinal[row["prompt"]]) for row in rows]
        except (FileNotFoundError, KeyError):
            return None
        except pa.ArrowException:  # damaged: it is written again
            return None

    def gathered(self, path: Path, rounds: int) -> Path:
        """All rounds below `rounds` as one file that a `weighted` job can train on."""
        tables = [
            pq.read_table(self._path(r), columns=["round", "prompt", *_SHARED])
            for r in range(rounds)
            if self._path(r).is_file()
        ]
        empty = pa.schema([_SCHEMA.field(name) for name in ("round", "prompt", *_SHARED)]).empty_table()
        table = pa.concat_tables([empty, *tables])
        of_prompt = [
            f"{r}-{p}" for r, p in zip(table["round"].to_pylist(), table["prompt"].to_pylist(), strict=True)
        ]
        table = table.drop_columns(["round", "prompt"]).append_column(
            "group", pa.array(of_prompt, pa.string())
        )
        temporary = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
        return path

    def _path(self, round_: int) -> Path:
        return self._directory / f"{_PREFIX}{round_:06d}.parquet"


def _row(round_: int, rollout: Rollout) -> dict[str, Any]:
    completion, routes = rollout.completion, rollout.completion.routes_TLK
    return {
        "round": round_,
        "prompt": rollout.prompt.ordinal,
        "sample": rollout.sample,
        "token_ids": rollout.token_ids_T,
        "prompt_tokens": len(rollout.prompt.token_ids_T),
        "logprobs": completion.log_prob_T,
        "text": rollout.text,
        "reward": rollout.grade.reward,
        "error": rollout.grade.error,
        "finish_reason": completion.finish_reason,
        "weight_version": completion.weight_version,
        "seed": completion.seed,
        "routes": None if routes is None else np.ascontiguousarray(routes).tobytes(),
        "routes_shape": None if routes is None else list(routes.shape),
        "routes_dtype": None if routes is None else str(routes.dtype),
    }


def _rollout(row: dict[str, Any], prompt: Prompt) -> Rollout:
    written = row["token_ids"][row["prompt_tokens"] :]
    if row["token_ids"][: row["prompt_tokens"]] != prompt.token_ids_T.tolist():
        raise KeyError(row["prompt"])  # another file's prompt
    routes = None
    if row["routes"] is not None:
        routes = np.frombuffer(row["routes"], dtype=row["routes_dtype"]).reshape(row["routes_shape"])
    return Rollout(
        prompt=prompt,
        sample=row["sample"],
        completion=Completion(
            token_ids_T=np.array(written, dtype=np.int32),
            log_prob_T=np.array(row["logprobs"], dtype=np.float32),
            finish_reason=row["finish_reason"],
            weight_version=row["weight_version"],
            seed=row["seed"],
            routes_TLK=routes,
        ),
        text=row["text"],
        grade=Grade(row["reward"], row["error"]),
    )
