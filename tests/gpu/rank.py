"""One trainer rank in this process, set up anew for each layout; a line of JSON for each.

    python -m tests.gpu.rank WANTED.json OUT.jsonl

A process of its own, because DeepSpeed chooses its device when it is imported. What a layout raises is its
answer; the others go on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from actors.network import free_port
from actors.trainer import TrainerRank, TrainerSpec
from modeseek_ray.config import Lora, Resources, Training
from modeseek_ray.types import Objective, Sample, StepPlan


@dataclass(frozen=True)
class Layout:
    """How a rank is set up, and what is done with it: a key of `WORK`."""

    name: str
    work: str
    resources: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    repeats: int = 2  # for `pace`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def unequal_rows(count: int, longest: int, vocabulary: int) -> list[Sample]:
    """Samples of 5 to `longest` tokens, the second half of each trained on."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, longest + 1, count)
    return [
        Sample(row, rng.integers(5, vocabulary, n).astype(np.int32), np.arange(n) >= n // 2)
        for row, n in enumerate(lengths)
    ]


def plan_of(samples: Sequence[Sample], step: int, *, weighted: bool = True) -> StepPlan:
    """Weights of mean one, none of them zero; all one without `weighted`."""
    values_N = np.linspace(0.25, 1.75, len(samples)) if weighted else np.ones(len(samples))
    return StepPlan(
        step=step,
        values_N=values_N,
        denominator=float(sum(s.num_tokens for s in samples)),
        learning_rate=1e-3,
    )


@contextmanager
def rank_of(model: str, layout: Layout) -> Iterator[TrainerRank]:
    spec = TrainerSpec(
        model_path=model,
        objective=Objective(),
        training=Training(lora=Lora(rank=4) if layout.lora else None),
        resources=Resources(**layout.resources),
        seed=0,
        persistence_threshold=0 if layout.work != "pace" else None,
    )
    rank = TrainerRank(spec, 0, 1, "127.0.0.1", free_port())
    rank.setup()
    try:
        yield rank
    finally:
        rank.close()
        _release()


def course(model: str, layout: Layout, samples: list[Sample]) -> dict[str, Any]:
    """Scores of the model as it is, token by token, and the losses of five weighted steps."""
    with rank_of(model, layout) as rank:
        tokens = rank.canary([s.token_ids_T for s in samples])
        steps = [_weighted_step(rank, samples, i) for i in range(5)]
        return {
            "tokens": [t.tolist() for t in tokens],
            "losses": [report.loss for report in steps],
            "grad_norms": [report.grad_norm for report in steps],
            "sha256": rank.weights_sha256(),
        }


def resume(model: str, layout: Layout, samples: list[Sample]) -> dict[str, Any]:
    """Four steps, twice; and once with a checkpoint and another rank in the middle."""
    courses = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(2):
            with rank_of(model, layout) as rank:
                losses = [_weighted_step(rank, samples, i).loss for i in range(2)]
                rank.save(directory)
                losses += [_weighted_step(rank, samples, i).loss for i in range(2, 4)]
                courses.append((losses, rank.weights_sha256()))
        with rank_of(model, layout) as rank:
            rank.load(directory)
            losses = courses[0][0][:2] + [_weighted_step(rank, samples, i).loss for i in range(2, 4)]
            courses.append((losses, rank.weights_sha256()))
    first, again, resumed = courses
    return {"same_bits_again": first == again, "same_bits_resumed": first == resumed}


def pace(model: str, layout: Layout, samples: list[Sample]) -> dict[str, Any]:
    """Seconds of a step without and with a scoring pass before it, parts of them, and peak memory."""
    started = time.perf_counter()
    with rank_of(model, layout) as rank:
        figures: dict[str, Any] = {"setup_s": time.perf_counter() - started}
        figures |= _after_setup()
        picks = [(0, i) for i in range(len(samples))]
        for name, weighted in (("sft", False), ("weighted", True)):
            seconds, parts = [], []
            for repeat in range(1 + layout.repeats):  # the first is not counted
                plan = plan_of(samples, repeat, weighted=weighted)
                _finish()
                started = time.perf_counter()
                if weighted:
                    rank.score(picks, samples)
                parts.append(rank.step(picks, plan, samples).seconds)
                _finish()
                seconds.append(time.perf_counter() - started)
            figures[f"{name}_step_s"] = median(seconds[1:])
            figures[f"{name}_parts_s"] = {k: median(p[k] for p in parts[1:]) for k in parts[-1]}
            figures[f"{name}_peak_bytes"] = _peak_bytes()
        figures["tokens"] = sum(s.length for s in samples)
        return figures


WORK = {"course": course, "resume": resume, "pace": pace}


def _weighted_step(rank: TrainerRank, samples: list[Sample], step: int) -> Any:
    picks = [(0, i) for i in range(len(samples))]
    rank.score(picks, samples)
    return rank.step(picks, plan_of(samples, step), samples)


def _release() -> None:
    """Give back what the layout held on the device, so that the next one finds it empty."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _after_setup() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_initialized():
        return {}
    held = {
        "held_bytes": torch.cuda.memory_allocated(),
        "setup_peak_bytes": torch.cuda.max_memory_allocated(),
    }
    torch.cuda.reset_peak_memory_stats()
    return held


def _finish() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak_bytes() -> int | None:
    """Since the last call, or set-up."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def main(wanted: dict[str, Any], out: Path) -> None:
    model, shape = wanted["model"], wanted["samples"]
    if wanted["equal"]:
        from tests.gpu.workload import Case

        samples = Case(**shape).rows()
    else:
        samples = unequal_rows(**shape)
    with out.open("w", encoding="utf-8") as file:
        for given in wanted["layouts"]:
            layout = Layout(**given)
            try:
                figures = WORK[layout.work](model, layout, samples)
            except Exception as error:
                figures = {"error": f"{type(error).__name__}: {error}"[:2000]}
                _release()
            file.write(json.dumps({"name": layout.name, **figures}) + "\n")
            file.flush()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
