"""The runs in their order: validation trial by trial, then report unit by unit; each stored once done.

A run is known by its content: what trains, on what, and the code that decides it. So the study may be
stopped and started at any time, in several processes, and only does what is missing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from modeseek_ray.retention import retention_at_success
from modeseek_ray.types import Sample
from tests.bench.forgetting import world
from tests.bench.forgetting.methods import CHECKPOINT, methods_of
from tests.bench.forgetting.probes import Probes
from tests.bench.forgetting.recipes import recipe_of
from tests.bench.forgetting.sampling import sample_answers
from tests.bench.forgetting.train import STEPS, Learner, Rows, Run, Setting, summed_log_probs, with_median

EVALUATE_AT = (5, 10, 15, 20, 26, 32, 40, 50, 65, 80, 100, 120)
LONG = "long"  # the piece `standard` with its selected trials, trained twice as long
LONG_STEPS, LONG_EVALUATE_AT = 2 * STEPS, (*EVALUATE_AT, 140, 160, 180, 200, 220, 240)
FOLLOWING = (LONG, "far", "noisy", "lengths")  # pieces that take over the trials selected in `standard`
TARGET, LEARNT = 0.9, 0.95
VALIDATION = ((1, 0), (2, 0))  # base seed, data seed
REPORT_BASES = {"dense": (5, 6, 7, 8, 9), "moe": (5, 6, 7, 9, 12)}  # those that `build` accepts: PROTOCOL.md
TRIALS = 10
PLANNED_TRIALS = {"dense": TRIALS, "moe": 5}  # five go through all learning rates
ONLINE_PROMPTS = 4  # of a step, 8 samples each
SOURCES = ("world.py", "train.py", "probes.py", "sampling.py")

Path_ = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    arch: str
    variant: str
    method: str
    trial: int
    base_seed: int
    data_seed: int

    @property
    def unit(self) -> tuple[str, str, int, int]:
        return self.arch, self.variant, self.base_seed, self.data_seed

    @property
    def setting(self) -> Setting:
        return methods_of(self.variant)[self.method].trials[self.trial]

    @property
    def is_validation(self) -> bool:
        return (self.base_seed, self.data_seed) in VALIDATION

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits over everything that decides the run's result."""
        content = {
            "unit": self.unit,
            "setting": asdict(self.setting),
            "recipe": asdict(recipe_of(self.arch, self.base_seed)),
            "evaluate_at": evaluate_at(self.variant),
            "checkpoint": asdict(CHECKPOINT) if self.setting.data_reference else None,
            "code": _code(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class Store:
    """Finished runs, one JSON line each. Several processes may append; a torn last line is passed over."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{file}.lock")

    def rows(self) -> dict[str, dict[str, Any]]:
        """By key; of a run stored twice the first."""
        found: dict[str, dict[str, Any]] = {}
        if not self.file.exists():
            return found
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # its process was ended while it wrote
            found.setdefault(row["key"], row)
        return found

    def add(self, row: Mapping[str, Any]) -> None:
        """On disk when this returns."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._lock, self.file.open("ab") as file:
            if file.tell() and not self.file.read_bytes().endswith(b"\n"):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class Unit:
    """A base with a variant's files and probes: what all methods on it share. The files are made on the CPU."""

    def __init__(
        self, arch: str, variant: str, base_seed: int, data_seed: int, home: Path, device: str = "cpu"
    ) -> None:
        self._device = device
        self.base = world.Base.of(arch, base_seed, home)
        self.frozen = self.base.frozen().to(device)
        self.data_seed, self._variant = data_seed, variant
        rows = world.training_file(self.base, variant, data_seed)
        samples = [*rows, *world.replay_file(self.base, data_seed, len(rows))]
        self.rows = Rows(samples, summed_log_probs(self.frozen, samples))
        self.probes = Probes(self.base, self.frozen, variant)
        self._with_data: Rows | None = None
        self.checkpoint_cpu_s = 0.0

    def run(self, setting: Setting, *, whole_path: bool) -> dict[str, Any]:
        """Train once and measure along the way: `path`, a row an evaluation, and processor times."""
        rows = self._rows_with_data() if setting.data_reference else self.rows
        setting = with_median(setting, rows)
        learner, steps = self._learner(setting), steps_of(self._variant)
        run = Run(learner, setting, rows, seed=self.data_seed, steps=steps, rounds=self._rounds())
        started = time.process_time()
        path: Path_ = [{"step": 0, "cpu_s": 0.0, **self.probes.measure(learner.module)}]
        for done, _ in run.finished():
            if done not in evaluate_at(self._variant):
                continue
            figures = {**self.probes.measure(learner.module), **run.course.take()}
            path.append({"step": done, "cpu_s": round(run.cpu_s, 3), **figures})
            if not whole_path and all(row["success"] >= LEARNT for row in path[-2:]):
                break
        spent = time.process_time() - started
        extra = self.checkpoint_cpu_s if setting.data_reference else 0.0
        return {"path": path, "total_cpu_s": round(spent, 2), "extra_cpu_s": round(extra, 2)}

    def _learner(self, setting: Setting) -> Learner:
        return Learner(self.base.fresh().to(self._device), self.frozen, setting, seed=self.data_seed)

    def _rows_with_data(self) -> Rows:
        """With likelihoods of an SFT checkpoint of this file, trained now: what `mode_seeking_data` pays for."""
        if self._with_data is None:
            started = time.process_time()
            learner = self._learner(CHECKPOINT)
            for _ in Run(learner, CHECKPOINT, self.rows, seed=self.data_seed).finished():
                pass
            log_data_R = summed_log_probs(learner.module, self.rows.samples)
            self._with_data = Rows(self.rows.samples, self.rows.log_reference_R, log_data_R)
            self.checkpoint_cpu_s = time.process_time() - started
        return self._with_data

    def _rounds(self) -> Any:
        """What writes and grades an online round; groups whose rewards all tie are left out, as in jobs."""
        encoder = world.Encoder(self.base.tokenizer)
        asked = world.training_questions(self.data_seed)

        def round_of(model: Any, step: int) -> list[Sample]:
            import torch

            order = np.random.default_rng((self.data_seed, step * ONLINE_PROMPTS // len(asked))).permutation(
                len(asked)
            )
            first = step * ONLINE_PROMPTS % len(asked)
            given = [asked[i] for i in order[first : first + ONLINE_PROMPTS]]
            generator = torch.Generator(self._device).manual_seed(10_000 * self.data_seed + step)
            return write_round(encoder, model, given, generator)

        return round_of


def write_round(encoder: world.Encoder, model: Any, given: Sequence[str], generator: Any) -> list[Sample]:
    """Eight graded answers to each question, of which only groups with differing rewards are kept."""
    asked = [letters for letters in given for _ in range(world.SAMPLES_PER_PROMPT)]
    prompts = [encoder.prompt(world.new_task.question(letters)) for letters in asked]
    answers, _ = sample_answers(model, prompts, encoder.end_id, generator=generator)
    rows = [
        replace(
            world.sample_of(i, prompts[i], answers[i]),
            group=i // world.SAMPLES_PER_PROMPT,
            reward=world.reward_of(asked[i], encoder.text(answers[i])),
        )
        for i in range(len(asked))
    ]
    telling = {g for g in {r.group for r in rows} if len({r.reward for r in rows if r.group == g}) > 1}
    return [row for row in rows if row.group in telling]


def validation_jobs(
    arch: str, variant: str, trials: int = TRIALS, units: Sequence[tuple[int, int]] = VALIDATION
) -> Iterator[Job]:
    """Trial by trial through all units and methods."""
    for trial in range(trials):
        for unit in units:
            for name in methods_of(variant):
                yield Job(arch, variant, name, trial, *unit)


def report_units(arch: str) -> tuple[tuple[int, int], ...]:
    """(base seed, data seed) of what is reported on, in their order: all bases with one data seed, then the next.

    >>> report_units("moe")[4:6]
    ((12, 1), (5, 2))
    """
    return tuple((base, data) for data in (1, 2) for base in REPORT_BASES[arch])


def report_jobs(
    arch: str,
    variant: str,
    selected: Mapping[str, int],
    units: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Job]:
    """Unit by unit through all methods, on all report units unless some are named."""
    for base_seed, data_seed in report_units(arch) if units is None else units:
        for name, trial in selected.items():
            yield Job(arch, variant, name, trial, base_seed, data_seed)


def steps_of(variant: str) -> int:
    """Optimizer steps of a run of this piece."""
    return LONG_STEPS if variant == LONG else STEPS


def evaluate_at(variant: str) -> tuple[int, ...]:
    """After which of them it is measured."""
    return LONG_EVALUATE_AT if variant == LONG else EVALUATE_AT


def source_of(variant: str) -> str:
    """The piece in which this one's trials are selected."""
    return "standard" if variant in FOLLOWING else variant


def score_of(paths: Sequence[Path_]) -> tuple[int, float]:
    """What selection maximises over the validation units: how many reached success .9, then the mean retention
    there; where none did, the mean of the highest successes."""
    kept = [
        retention_at_success([r["success"] for r in path], retention_of(path), target=TARGET)
        for path in paths
    ]
    reached = [k for k in kept if k is not None]
    best = [max(row["success"] for row in path) for path in paths]
    return len(reached), float(np.mean(reached or best))


def retention_of(path: Path_) -> list[float]:
    """Old accuracy over what it was before fine-tuning, per evaluation."""
    return [row["old_accuracy"] / path[0]["old_accuracy"] for row in path]


def select(
    arch: str,
    variant: str,
    rows: Mapping[str, Mapping[str, Any]],
    trials: int = TRIALS,
    methods: Sequence[str] | None = None,
    units: Sequence[tuple[int, int]] = VALIDATION,
) -> dict[str, int]:
    """The best trial of each method on these validation units, among the first trials that all of `methods` had."""
    seen: dict[str, list[tuple[int, float]]] = {}
    for name in methods or methods_of(variant):
        seen[name] = []
        for trial in range(trials):
            found = [rows.get(Job(arch, variant, name, trial, *unit).key) for unit in units]
            had = [row["path"] for row in found if row is not None]
            if len(had) < len(units):
                break
            seen[name].append(score_of(had))
    common = min(len(scores) for scores in seen.values())
    if common == 0:
        return {}
    return {name: max(range(common), key=lambda t: scores[t]) for name, scores in seen.items()}


@cache
def _code() -> str:
    """Hash of the code that decides results, as this process has it; comments and layout do not count."""
    digest = hashlib.sha256()
    for source in SOURCES:
        tree = ast.parse((Path(__file__).parent / source).read_text(encoding="utf-8"))
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()
